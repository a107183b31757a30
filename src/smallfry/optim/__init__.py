"""Natural-gradient optimizers that replace AdamW and change nothing else.

Usable alone: they know nothing of this package's models, data or training.
"""

from smallfry.optim.base import NaturalGradient
from smallfry.optim.ekfac import EKFAC
from smallfry.optim.exact import ExactNG
from smallfry.optim.inspect import BlockDiagnosis, Diagnosis, Summary
from smallfry.optim.kfac import KFAC

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagnosis",
    "Diagnosis",
    "ExactNG",
    "NaturalGradient",
    "Summary",
]
