"""Layers for any network: substitutes for dense layers, and parts of compact architectures."""
