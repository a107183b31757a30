import pytest
import torch

from smallfry.optim import EKFAC, KFAC, KPSVD, METHODS, SNGD, Deflation, ExactNG, Lanczos, TwoLevel

TESTED = {
    **{name: (method.optimizer, {}) for name, method in METHODS.items()},
    "kfac, tikhonov": (KFAC, {"damping_split": "tikhonov"}),
    "kfac, reduce": (KFAC, {"sharing": "reduce"}),
    "kfac, empirical": (KFAC, {"fisher": "empirical"}),
    "kfac, adaptive": (KFAC, {"adaptive_damping": True}),
    "kfac, quadratic": (KFAC, {"step_length": "quadratic"}),
    "kfac, per layer": (KFAC, {"damping_per": "layer"}),
    "kfac, rank": (KFAC, {"factor_rank": 2}),
    "ekfac, expand": (EKFAC, {"sharing": "expand"}),
    "ekfac, kpsvd": (EKFAC, {"basis": "kpsvd"}),
    "ekfac, rank": (EKFAC, {"factor_rank": 1}),
    "ekfac, kpsvd, rank": (EKFAC, {"basis": "kpsvd", "factor_rank": 2, "sharing": "reduce"}),
    "kpsvd, rank": (KPSVD, {"factor_rank": 2, "sharing": "expand"}),
    "kpsvd, pcg": (KPSVD, {"rank": 3, "inverse": "pcg"}),
    "lanczos, reduce": (Lanczos, {"sharing": "reduce"}),
    "deflation, rank": (Deflation, {"factor_rank": 2}),
    "two-level, nicolaides": (TwoLevel, {"coarse": "nicolaides", "krylov": True, "fine": "kpsvd"}),
    "two-level, many": (TwoLevel, {"coarse": ("z1", "residual", "previous"), "fine": "ekfac"}),
    "sngd, rfim": (SNGD, {"variant": "rfim"}),
    "exact, block": (ExactNG, {"scope": "block"}),
    "exact, window": (ExactNG, {"window": 3, "momentum": 0.9}),
}


SLOW = (  # the dearest of each method's settings
    *("deflation, rank", "kpsvd, pcg", "kpsvd, rank", "lanczos, reduce", "two-level, nicolaides"),
    *("two-level, many", "ekfac, kpsvd, rank", "ekfac, rank", "kfac, per layer", "kfac, tikhonov"),
)


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TESTED]
)
def method(request):
    """``method(model, **settings)`` builds one of the optimizers."""
    kind, fixed = TESTED[request.param]

    def build(model, **settings):
        return kind(model, **{"burn_in": 0, **fixed, **settings})

    build.name, build.kind, build.fixed = request.param, kind, fixed
    # conjugate gradients stop, and few eigenpairs are found, at their tolerance
    build.rtol = 1e-2 if fixed.keys() & {"inverse", "factor_rank"} else 1e-6
    return build


@pytest.fixture
def problem():
    """Inputs and labels that a small network can learn."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(48, 5, generator=random)
    return x, (x @ torch.randn(5, 3, generator=random)).argmax(1)
