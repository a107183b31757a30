"""Criticality: initial weights whose signals and gradients neither grow nor shrink with depth.

With z¹ = b¹ + W¹x, zˡ⁺¹ = bˡ⁺¹ + Wˡ⁺¹ σ(zˡ), Var b = C_b, Var W = C_W / fan-in, and ⟨f⟩ the mean
of f(z) for z ~ N(0, K), wide networks have

    kernel                      K ← C_b + C_W ⟨σ²⟩
    parallel susceptibility     χ∥ = C_W ⟨z σ σ′⟩ / K      of norms
    perpendicular one           χ⊥ = C_W ⟨σ′²⟩             of angles, and of gradients going back
    vertex, at width n          V/n ← χ∥² V/n + C_W² (⟨σ⁴⟩ − ⟨σ²⟩²) / n

and are critical where K stays and χ∥ = χ⊥ = 1. Applied again and again, the same weights W add
correlations between steps: see ``residual_kernels``.

Source: Roberts, Yaida, Hanin, The Principles of Deep Learning Theory, 2022. Repeated weights are
our own derivation.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from smallfry.errors import UsageError, nearest

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Criticality",
    "Moments",
    "UniversalityClass",
    "aspect_ratio",
    "correlated_mean",
    "find_activation",
    "find_critical",
    "kernels",
    "moments",
    "residual_kernels",
    "vertices",
]

UniversalityClass = Literal["scale-invariant", "K* = 0", "half-stable"]
REACH = 12.0  # standard deviations that quadrature covers
NODES = 20  # of a panel
SMALL = (1e-4, 1e-3)  # kernels at which the class K* = 0 is recognised
ROOTS = np.logspace(-3, 3, 61)  # kernels between which roots are sought


class Activation(NamedTuple):
    """Activation with the places where its derivative jumps."""

    name: str
    function: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = (0.0,)


def _leaky(slope: float) -> Activation:
    return Activation(f"leaky_relu_{slope:g}", lambda z: F.leaky_relu(z, slope))


ACTIVATIONS = {
    each.name: each
    for each in (
        Activation("linear", lambda z: z.clone()),
        Activation("relu", F.relu),
        _leaky(0.01),
        _leaky(0.1),
        _leaky(0.2),
        Activation("tanh", torch.tanh, ()),
        Activation("sin", torch.sin, ()),
        Activation("erf", torch.erf, ()),
        Activation("arctan", torch.arctan, ()),
        Activation("gelu", F.gelu),
        Activation("gelu_tanh", lambda z: F.gelu(z, approximate="tanh")),
        Activation("silu", F.silu),
        Activation("mish", F.mish),
        Activation("hardswish", F.hardswish, (-3.0, 0.0, 3.0)),
        Activation("elu", F.elu),
        Activation("selu", F.selu),
        Activation("sigmoid", torch.sigmoid),
        Activation("softplus", F.softplus),
        Activation("relu2", lambda z: F.relu(z).square()),
    )
}


class Moments(NamedTuple):
    """Gaussian means of an activation at kernel K."""

    square: float  # ⟨σ²⟩
    fourth: float  # ⟨σ⁴⟩
    slope_square: float  # ⟨σ′²⟩
    product: float  # ⟨z σ σ′⟩
    square_4: float  # ⟨σ² He₄(z/√K)⟩ / (4 K²), the second derivative of ⟨σ²⟩ by K
    slope_2: float  # ⟨σ′² He₂(z/√K)⟩ / (2 K), the derivative of ⟨σ′²⟩ by K


class Criticality(NamedTuple):
    """Critical initialisation of an activation.

    Attributes:
        activation: Its name.
        kind: Universality class.
        weight: C_W, the variance of a weight times its fan-in.
        bias: C_b, the variance of a bias.
        kernel: K*, mean square of a preactivation; 0 in the class K* = 0, and 1, which stands for
            any, in the scale-invariant class.
        vertex: Growth of V / (n K²) a layer (ν), over the width n; not a number in the class
            K* = 0 with kinks, where no value is known.
        parallel_slope: dχ∥/dK at K*.
        perpendicular_slope: dχ⊥/dK at K*.
    """

    activation: str
    kind: UniversalityClass
    weight: float
    bias: float
    kernel: float
    vertex: float
    parallel_slope: float = 0.0
    perpendicular_slope: float = 0.0

    def first_weight(self, mean_square: float) -> float:
        """Compute C_W of the first layer, which brings inputs of a mean square to K*."""
        if self.kind != "half-stable":
            return self.weight
        return (self.kernel - self.bias) / mean_square


def find_activation(name: str) -> Activation:
    """Find an activation of ``ACTIVATIONS``.

    Raises:
        UsageError: There is none of this name.
    """
    if name not in ACTIVATIONS:
        raise UsageError(
            f"unknown activation '{name}'; an Activation of your own works, too"
            f"{nearest(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def moments(activation: Activation, kernel: float) -> Moments:
    """Compute Gaussian means by quadrature, to about 1e-14 relatively.

    Args:
        activation: The activation.
        kernel: Variance of its argument, above 0.

    Example:
        >>> round(moments(find_activation("relu"), 2.0).square, 12)
        1.0
    """
    z, weights = _nodes(kernel, activation.kinks)
    value, slope = _with_slope(activation.function, z)
    unit = (z / math.sqrt(kernel)).square()

    def mean(values: Tensor) -> float:
        return float(weights @ values)

    return Moments(
        mean(value**2),
        mean(value**4),
        mean(slope**2),
        mean(z * value * slope),
        mean(value**2 * (unit**2 - 6 * unit + 3)) / (4 * kernel**2),
        mean(slope**2 * (unit - 1)) / (2 * kernel),
    )


def find_critical(activation: str | Activation) -> Criticality:
    """Find the critical initialisation of an activation by quadrature.

    Of several half-stable points the one of the smallest kernel is taken.

    Raises:
        UsageError: There is none, as of the sigmoid.

    Example:
        >>> point = find_critical("gelu")
        >>> point.kind, round(point.weight, 6), round(point.bias, 6)
        ('half-stable', 1.983058, 0.172922)
    """
    act = find_activation(activation) if isinstance(activation, str) else activation
    left, right = _slopes_at_zero(act)
    square = (left**2 + right**2) / 2
    if _is_scale_invariant(act) and square > 0:
        ratio = (left**4 + right**4) / 2 / square**2
        return Criticality(act.name, "scale-invariant", 1 / square, 0.0, 1.0, 3 * ratio - 1)
    for kernel in _roots(act):
        found = moments(act, kernel)
        weight = 1 / found.slope_square
        bias = kernel - weight * found.square
        if bias >= 0:
            return Criticality(
                *(act.name, "half-stable", weight, bias, kernel),
                weight**2 * (found.fourth - found.square**2) / kernel**2,
                weight * found.square_4,
                weight * found.slope_2,
            )
    starts_at_zero = float(act.function(torch.zeros((), dtype=torch.float64))) == 0
    if starts_at_zero and square > 0 and all(moments(act, k).square < square * k for k in SMALL):
        vertex = math.nan if act.kinks else 2 / 3
        return Criticality(act.name, "K* = 0", 1 / square, 0.0, 0.0, vertex)
    raise UsageError(
        f"{act.name} has no critical initialisation: normalise before each layer, or take another "
        "activation, such as tanh, relu or gelu"
    )


def kernels(
    activation: Activation, weight: float, bias: float, start: float, layers: int
) -> list[float]:
    """Compute the kernels of ``layers`` layers; the first is ``start``."""
    found = [start]
    for _ in range(layers - 1):
        found.append(bias + weight * moments(activation, found[-1]).square)
    return found


def vertices(activation: Activation, point: Criticality, start: float, layers: int) -> list[float]:
    """Compute V of ``layers`` layers, where V/n is the excess of E[z_i² z_j²] over K²."""
    found, kernel = [0.0], start
    for _ in range(layers - 1):
        means = moments(activation, kernel)
        parallel = point.weight * means.product / kernel
        source = point.weight**2 * (means.fourth - means.square**2)
        found.append(parallel**2 * found[-1] + source)
        kernel = point.bias + point.weight * means.square
    return found


def aspect_ratio(point: Criticality, outputs: int) -> float:
    """Estimate the best depth over width, (4 / (20 + 3 outputs)) / ν.

    Warning:
        An order of magnitude for small data from an information criterion, quoted from memory, and
        no law for networks with norms and residuals.
    """
    return 4 / (20 + 3 * outputs) / point.vertex


def correlated_mean(activation: Activation, correlation: float) -> float:
    """Compute E σ(u)σ(v) at unit variances, in closed form for ReLU (κ)."""
    rho = max(-1.0, min(1.0, correlation))
    if activation.name == "relu":
        return (math.sqrt(1 - rho**2) + rho * (math.pi - math.acos(rho))) / (2 * math.pi)
    if rho == 1:
        return moments(activation, 1.0).square
    u, weights = _nodes(1.0, activation.kinks)
    v = rho * u[:, None] + math.sqrt(1 - rho**2) * u
    return float((weights * activation.function(u)) @ activation.function(v) @ weights)


def residual_kernels(
    activation: Activation, weight: float, steps: int, tied: bool, branch: float = 1.0
) -> NDArray[np.float64]:
    """Compute the kernels between all steps of a pre-norm residual block.

    The block is z ← z + s W₂ σ(W₁ norm(z)), with Var W₁ = 1/n, Var W₂ = ``weight``/n and E z² = 1
    at the start. With the same weights in each step, its changes stay correlated, and z² grows as
    t²; with new ones it grows as t.

    Args:
        activation: σ.
        weight: C₂.
        steps: T.
        tied: All steps use the same weights.
        branch: Factor of the change (s).

    Returns:
        (steps + 1, steps + 1), E z_s z_t.

    Example:
        >>> relu = find_activation("relu")
        >>> residual_kernels(relu, 2.0, 3, tied=True).diagonal().round(4).tolist()
        [1.0, 2.0, 4.5108, 8.5393]
    """
    changes = np.zeros((steps, steps))
    found = np.ones((steps + 1, steps + 1))
    for t in range(steps):
        for s in range(t + 1) if tied else [t]:
            norm = math.sqrt(found[s, s] * found[t, t])
            mean = correlated_mean(activation, 1.0 if s == t else found[s, t] / norm)
            changes[s, t] = changes[t, s] = branch**2 * weight * mean
        sums = changes[: t + 1, : t + 1].cumsum(0).cumsum(1)
        found[t + 1, 1 : t + 2] = found[1 : t + 2, t + 1] = 1 + sums[-1]
    return found


# Quadrature


def _nodes(kernel: float, kinks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return nodes of Gauss–Legendre panels that end at kinks, and weights with N(0, K)."""
    root = math.sqrt(kernel)
    fine = np.outer((-1, 1), 2.0 ** np.arange(-3, 10)).ravel()  # activations bend near 0
    ends = np.concatenate([np.linspace(-REACH, REACH, 49) * root, fine, np.array(kinks)])
    ends = np.unique(ends[np.abs(ends) <= REACH * root])
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half, middle = np.diff(ends)[:, None] / 2, (ends[1:] + ends[:-1])[:, None] / 2
    z = (middle + half * nodes).ravel()
    density = np.exp(-(z**2) / (2 * kernel)) / math.sqrt(2 * math.pi * kernel)
    return torch.from_numpy(z), torch.from_numpy((half * weights).ravel() * density)


def _with_slope(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = function(point)
        (slope,) = torch.autograd.grad(value.sum(), point)
    return value.detach(), slope


def _slopes_at_zero(activation: Activation) -> tuple[float, float]:
    z = torch.tensor([-1e-12, 1e-12], dtype=torch.float64)
    left, right = _with_slope(activation.function, z)[1].tolist()
    return left, right


def _is_scale_invariant(activation: Activation) -> bool:
    z = torch.tensor([-7.0, -1.0, -0.1, 0.1, 1.0, 7.0], dtype=torch.float64)
    doubled, value = activation.function(2 * z), activation.function(z)
    return bool(torch.allclose(doubled, 2 * value, rtol=1e-12, atol=0))


def _roots(activation: Activation) -> list[float]:
    """Return kernels at which χ∥ = χ⊥, which C_W does not change, in ascending order."""
    from scipy.optimize import brentq  # of the extra train, where models are made without it

    def excess(kernel: float) -> float:
        found = moments(activation, kernel)
        return found.product / (kernel * found.slope_square) - 1

    values = [excess(kernel) for kernel in ROOTS]
    pairs = zip(ROOTS, ROOTS[1:], values, values[1:], strict=False)
    return [brentq(excess, a, b, xtol=1e-14, rtol=1e-15) for a, b, f, g in pairs if f * g < 0]
