"""A network of three inputs and classes, and steps on batches of it."""

import torch
from torch import nn
from torch.nn import functional as F

from smallfry.curvature.likelihoods import Categorical

D = torch.float64


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)


def batch(size=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, dtype=D, generator=random)
    return x, torch.randint(3, (size,), generator=random)


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def divergence(before, after):
    return float(Categorical().divergence((before,), (after,)).mean())


def moved(model, optimizer, x, y):
    """The divergence of a step on its own batch."""
    with torch.no_grad():
        before = model(x)
    step(model, optimizer, x, y)
    with torch.no_grad():
        return divergence(before, model(x))
