import pytest
import torch

from smallfry.optim import EKFAC, KFAC, ExactNG

METHODS = {
    "kfac": (KFAC, {}),
    "kfac, tikhonov": (KFAC, {"damping_split": "tikhonov"}),
    "kfac, reduce": (KFAC, {"sharing": "reduce"}),
    "kfac, empirical": (KFAC, {"fisher": "empirical"}),
    "kfac, adaptive": (KFAC, {"adaptive_damping": True}),
    "kfac, quadratic": (KFAC, {"step_length": "quadratic"}),
    "kfac, per layer": (KFAC, {"damping_per": "layer"}),
    "kfac, rank": (KFAC, {"rank": 2}),
    "ekfac": (EKFAC, {}),
    "ekfac, expand": (EKFAC, {"sharing": "expand"}),
    "exact": (ExactNG, {}),
    "exact, block": (ExactNG, {"scope": "block"}),
    "exact, window": (ExactNG, {"window": 3}),
}


@pytest.fixture(params=METHODS)
def method(request):
    """``method(model, **settings)`` builds one of the optimizers."""
    kind, fixed = METHODS[request.param]

    def build(model, **settings):
        return kind(model, **{"burn_in": 0, **fixed, **settings})

    build.name, build.kind, build.fixed = request.param, kind, fixed
    return build


@pytest.fixture
def problem():
    """Inputs and labels that a small network can learn."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(48, 5, generator=random)
    return x, (x @ torch.randn(5, 3, generator=random)).argmax(1)
