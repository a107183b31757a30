"""AdaRound: weights rounded up or down for the least error of a layer's outputs.

    Ŵ = s clamp(⌊W/s⌋ + h(V), −Q, Q),   h(V) = clamp(1.2 σ(V) − 0.1, 0, 1),
    minimise  mean ‖W x − Ŵ x̂‖² + λ Σ (1 − |2h − 1|^β)

(Nagel et al. 2020, arXiv 2004.10568), x the rows of the model in floating point and x̂ those of the
model that is quantised so far. The mean is taken over all calibration rows at once, through their
second moments, where the paper draws batches: it needs no seed, and far fewer iterations. β falls
from 20 to 2 along a cosine; h ends at 0 or 1. λ is relative to the error of nearest rounding, as an
absolute one is too weak for some layers and too strong for others. The outputs' errors don't depend
on each other, and every output keeps nearest rounding where that has the smaller error.
"""

from math import cos, pi
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.compress.quantize.moments import Moments
from smallfry.layers.quantizers import encode, largest_code

WARM_UP = 0.2  # share of the iterations without the second term
STRETCH = (1.2, -0.1)
BETAS = (20.0, 2.0)
STRENGTH = 20.0  # λ over the mean error of nearest rounding per weight


class Rounding(NamedTuple):
    """Codes of a weight, and the errors of its outputs."""

    codes: Tensor  # (groups, outputs, inputs)
    error: Tensor  # mean squared error of each output, (groups, outputs)
    nearest: Tensor  # that of nearest rounding


def adaptive_rounding(
    weight: Tensor,
    scale: Tensor,
    bits: int,
    seen: Moments,
    iterations: int = 1000,
    rate: float = 0.01,
) -> Rounding:
    """Round a weight so that the error of its outputs is small.

    Args:
        weight: (groups, outputs, inputs).
        scale: Positive, broadcastable to the weight.
        bits: Bits of the codes.
        seen: Moments of the layer's inputs.
        iterations: Steps of Adam.
        rate: Adam's learning rate.
    """
    most, weight, scale = largest_code(bits), weight.double(), scale.double()
    nearest = encode(weight, scale, 0, -most, most)
    lower = (weight / scale).floor()
    rest = (weight / scale - lower).clamp(1e-3, 1 - 1e-3)
    v = torch.logit((rest - STRETCH[1]) / STRETCH[0]).float().requires_grad_()
    objective = _Objective(weight.float(), seen)
    unit = float(objective.error((nearest * scale).float()).mean()) / weight.shape[-1]
    scale32, lower32 = scale.float(), lower.float()
    optimizer = torch.optim.Adam([v], rate)
    for step in range(iterations):
        h = _soft(v)
        codes = lower32 + h
        inside = ((codes >= -most) & (codes <= most)).float()
        rounded = codes.detach().clamp(-most, most) * scale32
        with torch.no_grad():
            pull = objective.gradient(rounded) * scale32 * inside
        loss = (pull * h).sum()  # its gradient is that of the error
        done = (step / iterations - WARM_UP) / (1 - WARM_UP)
        if done >= 0:
            beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1 + cos(pi * done)) / 2
            loss = loss + STRENGTH * unit * (1 - (2 * h - 1).abs() ** beta).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    up = (_soft(v.detach()) >= 0.5).double()
    found = (lower + up).clamp(-most, most)
    exact = _Objective(weight, seen)
    error, plain = exact.error(found * scale), exact.error(nearest * scale)
    codes = torch.where((error <= plain)[..., None], found, nearest)
    return Rounding(codes, torch.minimum(error, plain), plain)


class _Objective:
    """Mean squared error of the outputs as a function of the rounded weight."""

    def __init__(self, weight: Tensor, seen: Moments) -> None:
        self._target = weight @ seen.cross.to(weight)  # E of W x times x̂
        self._constant = ((weight @ seen.square.to(weight)) * weight).sum(-1)
        self._square = seen.rounded_square.to(weight)

    def error(self, rounded: Tensor) -> Tensor:
        """Compute the error of each output, (groups, outputs)."""
        both = rounded @ self._square - 2 * self._target
        return ((both * rounded).sum(-1) + self._constant).clamp(min=0)

    def gradient(self, rounded: Tensor) -> Tensor:
        """Compute the derivative of the summed error."""
        return 2 * (rounded @ self._square - self._target)


def _soft(v: Tensor) -> Tensor:
    return (STRETCH[0] * v.sigmoid() + STRETCH[1]).clamp(0, 1)
