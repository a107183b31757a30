"""Table of the natural-gradient optimizers, for training, studies, docs and tests.

A method that is added here is one everywhere.
"""

from collections.abc import Callable
from typing import NamedTuple

from smallfry.optim.base import NaturalGradient
from smallfry.optim.corrected import KFACCorrected
from smallfry.optim.ekfac import EKFAC
from smallfry.optim.exact import ExactNG
from smallfry.optim.kfac import KFAC
from smallfry.optim.kpsvd import KPSVD, Deflation, Lanczos
from smallfry.optim.sngd import SNGD
from smallfry.optim.two_level import TwoLevel


class Method(NamedTuple):
    """Natural-gradient optimizer in the table."""

    name: str  # in configurations
    label: str  # in tables
    optimizer: Callable[..., NaturalGradient]
    lr: float = 0.1  # of a whole training run; steps are in units of the curvature
    least_damping: float = 0.0  # of a Fisher that has no more directions than samples


METHODS = {
    method.name: method
    for method in (
        Method("kfac", "KFAC", KFAC),
        Method("ekfac", "EKFAC", EKFAC),
        Method("kpsvd", "KPSVD", KPSVD),
        Method("deflation", "Deflation", Deflation),
        Method("lanczos", "Lanczos", Lanczos),
        Method("kfac_corrected", "KFAC-corrected", KFACCorrected),
        Method("two_level", "two-level", TwoLevel),
        Method("sngd", "SNGD", SNGD),
        Method("exact_ng", "exact NG", ExactNG, least_damping=10.0),
    )
}
