"""Codecs of data: probabilistic circuits, for learning a distribution and coding samples."""

from smallfry.compress.coding.circuits import HCLT

__all__ = ["HCLT"]
