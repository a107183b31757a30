"""Programs that write graphs, graph networks of these graphs, and a search for programs.

"Symbolic synthesis of neural networks", arXiv 2303.03340: a program's graph is the structure of a
network behind an encoder of images, and common parts of good programs become new primitives.
"""
