"""Pruning of channels."""
