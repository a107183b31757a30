"""Quantisation of weights."""
