"""Plots of runs; each function draws one and writes it atomically."""
