"""Layers that stand for dense ones: fewer numbers, or numbers of fewer bits."""
