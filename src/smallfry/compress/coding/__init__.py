"""Lossless coding: probabilistic circuits, rANS and packed files."""
