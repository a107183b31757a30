"""The most accurate model under a budget: search, training, compression and export."""

from smallfry.fitting.config import Budget, FitConfig
from smallfry.fitting.run import fit

__all__ = ["Budget", "FitConfig", "fit"]
