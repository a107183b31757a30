"""Recognising places of a route by compact spiking modules with local learning.

Hussaini, Milford, Fischer, "Ensembles of Compact, Region-specific and Regularized Spiking Neural
Networks for Scalable Place Recognition", ICRA 2023.
"""
