import pytest
import torch
from torch import nn

from smallfry.optim import EKFAC, KFAC, ExactNG

METHODS = {
    "kfac": (KFAC, {}),
    "kfac, tikhonov": (KFAC, {"damping_split": "tikhonov"}),
    "kfac, reduce": (KFAC, {"sharing": "reduce"}),
    "kfac, empirical": (KFAC, {"fisher": "empirical"}),
    "kfac, adaptive": (KFAC, {"adaptive_damping": True}),
    "kfac, quadratic": (KFAC, {"step_length": "quadratic"}),
    "kfac, per layer": (KFAC, {"damping_per": "layer"}),
    "ekfac": (EKFAC, {}),
    "ekfac, expand": (EKFAC, {"sharing": "expand"}),
    "exact": (ExactNG, {}),
    "exact, block": (ExactNG, {"scope": "block"}),
    "exact, window": (ExactNG, {"window": 3}),
}


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """Matrices of a few rows: a second thread only waits."""
    torch.set_num_threads(1)


class Net(nn.Module):
    """A little of everything: shared and plain layers, a norm, an embedding-like parameter."""

    def __init__(self, norm=True, inputs=5, classes=3):
        super().__init__()
        self.first, self.shared = nn.Linear(inputs, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        z = h = self.first(x)
        for _ in range(2):
            z = torch.tanh(self.shared(z)) + h
        return self.head(self.act(self.norm(z)))


@pytest.fixture(params=METHODS)
def method(request):
    """``method(model, **settings)`` builds one of the optimizers."""
    kind, fixed = METHODS[request.param]

    def build(model, **settings):
        return kind(model, **{**fixed, **settings})

    build.name, build.kind, build.fixed = request.param, kind, fixed
    return build


@pytest.fixture
def problem():
    """Inputs and labels that a small network can learn."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(48, 5, generator=random)
    return x, (x @ torch.randn(5, 3, generator=random)).argmax(1)
