"""Flying by one camera: floor and obstacles, metric depth, and policies, in generated rooms.

Mocanu, Slușanschi, Leordeanu, arXiv 2510.16624, have the problem: metric depth from the ground, a
compact segmentation student, a policy. Its equations, networks and simulator are not published;
those here are our own design.
"""
