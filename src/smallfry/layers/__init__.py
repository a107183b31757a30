"""Substitutes for dense layers, with fewer or narrower numbers."""
