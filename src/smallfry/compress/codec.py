"""Codecs of data: probabilistic circuits that learn a distribution and code samples with it."""

from smallfry.compress.coding.circuits import HCLT

__all__ = ["HCLT"]
