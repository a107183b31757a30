"""Natural-gradient optimizers as drop-in replacements for AdamW.

Usable alone: they are independent of this package's models, data and training.
"""

from smallfry.optim.adam_atan2 import AdamATan2
from smallfry.optim.approximation import Approximation
from smallfry.optim.base import NaturalGradient
from smallfry.optim.corrected import CorrectedProduct, KFACCorrected
from smallfry.optim.ekfac import EKFAC, DiagonalInBasis
from smallfry.optim.exact import ExactNG
from smallfry.optim.inspect import BlockDiagnosis, Diagnosis, Summary
from smallfry.optim.kfac import KFAC, KroneckerProduct
from smallfry.optim.kpsvd import KPSVD, Deflation, Lanczos, NearestProduct, NearestSum
from smallfry.optim.methods import METHODS, Method
from smallfry.optim.preconditioner import Preconditioner
from smallfry.optim.settings import CurvatureSettings
from smallfry.optim.sngd import SNGD, InputMetric
from smallfry.optim.two_level import TwoLevel

__all__ = [
    "EKFAC",
    "KFAC",
    "KPSVD",
    "METHODS",
    "SNGD",
    "AdamATan2",
    "Approximation",
    "BlockDiagnosis",
    "CorrectedProduct",
    "CurvatureSettings",
    "Deflation",
    "Diagnosis",
    "DiagonalInBasis",
    "ExactNG",
    "InputMetric",
    "KFACCorrected",
    "KroneckerProduct",
    "Lanczos",
    "Method",
    "NaturalGradient",
    "NearestProduct",
    "NearestSum",
    "Preconditioner",
    "Summary",
    "TwoLevel",
]
