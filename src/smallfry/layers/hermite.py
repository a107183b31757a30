"""Hermite activations, their dual functions, and the limits of infinitely deep networks.

An activation with E σ(z)² = 1, z ~ N(0, 1), is Σ a_k He_k / √k!, Σ a_k² = 1, and its dual is

    ψ(ξ) = E σ(u)σ(v) = Σ a_k² ξ^k,   u, v of variance 1 and correlation ξ.

Deep networks of such activations, infinitely wide and without biases, classify by the neural
tangent kernel S ← ψ(S), Θ ← ψ(S) + Θ ψ′(S), from S = Θ = ξ. As depth goes to infinity this is

    ψ(0) > 0                              a majority vote
    ψ(0) = 0, ψ′(0) = 0                   the nearest neighbour
    ψ(0) = 0, 0 < ψ′(0) < 1 < ψ′(1)       votes weighted by 1/r^α, α = −2 ln ψ′(0) / ln ψ′(1)

and Bayes-consistent where α is the dimension of the sphere. Networks of finite width and depth, or
with norms, differ.

Source: Radhakrishnan, Belkin, Uhler, "Wide and deep neural networks achieve consistency for
classification", PNAS 2023, arXiv 2204.14126.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smallfry.errors import UsageError

__all__ = [
    "DeepLimit",
    "Dual",
    "Hermite",
    "Limit",
    "deep_kernel",
    "dual",
    "find_limit",
    "hermite_coefficients",
    "optimal_coefficients",
    "relu_dual",
]

Array = NDArray[np.float64]
Function = Callable[[Array], Array]
Limit = Literal["majority vote", "nearest neighbour", "singular kernel", "unknown"]
TERMS = 60  # of the expansion of an arbitrary activation
REACH, PANELS, NODES = 12.0, 48, 20  # of quadrature
ZERO = 1e-12  # of squared coefficients


class Dual(NamedTuple):
    """Dual function and its derivative."""

    value: Function  # ψ
    slope: Function  # ψ′


class DeepLimit(NamedTuple):
    """Classifier that depth makes of an activation.

    Attributes:
        kind: Of the classifier.
        at_zero: ψ(0).
        slope_at_zero: ψ′(0).
        slope_at_one: ψ′(1).
        exponent: α of a singular kernel; else not a number.
    """

    kind: Limit
    at_zero: float
    slope_at_zero: float
    slope_at_one: float
    exponent: float


class Hermite(nn.Module):
    """Activation Σ a_k He_k / √k!.

    Args:
        coefficients: a₀, a₁, …; scaled to squares that add up to 1.

    Raises:
        UsageError: All are 0.

    Example:
        >>> import torch
        >>> Hermite([0, 1])(torch.tensor([2.0]))
        tensor([2.])
    """

    def __init__(self, coefficients: Sequence[float]) -> None:
        super().__init__()
        size = math.sqrt(sum(a**2 for a in coefficients))
        if size == 0:
            raise UsageError("a Hermite activation needs a coefficient other than 0")
        self.coefficients = tuple(a / size for a in coefficients)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply to each element."""
        before, current = torch.zeros_like(inputs), torch.ones_like(inputs)
        total = self.coefficients[0] * current
        for k, a in enumerate(self.coefficients[1:], 1):
            # normalised: h_k = (x h_{k−1} − √(k−1) h_{k−2}) / √k
            before, current = (
                current,
                (inputs * current - math.sqrt(k - 1) * before) / math.sqrt(k),
            )
            total = total + a * current
        return total


def hermite_coefficients(activation: Callable[[Tensor], Tensor], terms: int = TERMS) -> Array:
    """Expand an activation, scaled to E σ² = 1, by quadrature: (terms,) coefficients.

    Example:
        >>> import torch
        >>> hermite_coefficients(torch.relu, 3).round(4).tolist()
        [0.5642, 0.7071, 0.3989]
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    ends = np.linspace(-REACH, REACH, PANELS + 1)  # 0 is one of them: kinks are there
    half, middle = np.diff(ends)[:, None] / 2, (ends[1:] + ends[:-1])[:, None] / 2
    z = (middle + half * nodes).ravel()
    density = (half * weights).ravel() * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    value = activation(torch.from_numpy(z)).numpy()
    square = float(density @ value**2)
    found, before, current = [], np.zeros_like(z), np.ones_like(z)
    for k in range(1, terms + 1):
        found.append(float(density @ (value * current)))
        before, current = current, (z * current - math.sqrt(k - 1) * before) / math.sqrt(k)
    return np.array(found) / math.sqrt(square)


def dual(coefficients: Sequence[float] | Array) -> Dual:
    """Return the dual function of coefficients.

    Example:
        >>> round(float(dual([0.0, 0.6, 0.8]).value(np.array(0.5))), 12)
        0.34
    """
    polynomial = np.polynomial.Polynomial(np.square(coefficients))
    return Dual(cast(Function, polynomial), cast(Function, polynomial.deriv()))


def relu_dual() -> Dual:
    """Return the dual function of ReLU in closed form, which no short series gives near 1."""

    def value(xi: Array) -> Array:
        part: Array = (np.sqrt(1 - xi**2) + xi * (np.pi - np.arccos(xi))) / np.pi
        return part

    return Dual(value, lambda xi: 1 - np.arccos(xi) / np.pi)


def find_limit(at_zero: float, slope_at_zero: float, slope_at_one: float) -> DeepLimit:
    """Find the classifier that depth makes of an activation from ψ(0), ψ′(0) and ψ′(1).

    Example:
        >>> limit = find_limit(0.0, 0.5, 2.0)
        >>> limit.kind, limit.exponent
        ('singular kernel', 2.0)
    """
    kind: Limit = "unknown"
    exponent = math.nan
    if at_zero > ZERO:
        kind = "majority vote"
    elif slope_at_zero <= ZERO:
        kind = "nearest neighbour"
    elif slope_at_zero < 1 - ZERO and slope_at_one > 1 + ZERO:
        kind = "singular kernel"
        exponent = -2 * math.log(slope_at_zero) / math.log(slope_at_one)
    return DeepLimit(kind, at_zero, slope_at_zero, slope_at_one, exponent)


def optimal_coefficients(dimension: int) -> Array:
    """Return coefficients whose limit weighs votes by 1/r^dimension, which is Bayes-consistent.

    For dimension 1 they are our own derivation.

    Raises:
        UsageError: The dimension of the sphere is below 1.

    Example:
        >>> optimal_coefficients(4).round(4).tolist()
        [0.0, 0.5, 0.7071, 0.5]
    """
    if dimension < 1:
        raise UsageError(f"a sphere has dimension 1 or more, not {dimension}")
    if dimension == 1:
        first = 2**-0.5
        fifth = 2 - first - 4 * (1 - first)
        return np.sqrt([0, first, 0, 0, 1 - first - fifth, fifth])
    first = 2 ** (-dimension / 2)
    return np.sqrt([0, first, max(0.0, 1 - 2 * first), first])


def deep_kernel(correlations: Array, function: Dual, depth: int) -> Array:
    """Compute the neural tangent kernel of a deep network on the sphere, over its value at ξ = 1.

    That value is Σ ψ′(1)^k over k ≤ depth.

    Args:
        correlations: ξ between inputs of norm 1.
        function: Dual of the activation.
        depth: Hidden layers.
    """
    slope_at_one = float(function.slope(np.array(1.0)))
    similarity = np.clip(correlations, -1, 1)
    kernel, inverse = similarity, 1.0  # 1 over the value at ξ = 1
    for _ in range(depth):
        kernel = kernel * function.slope(similarity) / (inverse + slope_at_one)
        inverse /= inverse + slope_at_one
        # above 1 by rounding, it would explode
        similarity = np.clip(function.value(similarity), -1, 1)
        kernel = kernel + inverse * similarity
    return kernel
