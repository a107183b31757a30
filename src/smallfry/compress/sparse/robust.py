"""Penalties for robust sparse networks: transformed l1 and condition numbers.

    ρ_a(w) = (a + 1)|w|/(a + |w|)                          between ℓ₀ (a → 0) and ℓ₁ (a → ∞)
    log κ ≤ log 2 − Σ log σ_i + r log(‖W‖_F/√r)            Guggenheimer, Edelman, Johnson (gej)
    ½ r log(mean σ²) − Σ log σ ≥ 0                         zero where all σ are equal (am_gm)

of the singular values σ of a matrix W of rank r at most (convolutions as outputs × the rest); both
surrogates ignore the scale of W. After the idea of TSCNC (arXiv 2503.20454), whose own formulas are
not published; these are ours.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from smallfry.compress.sparse.masks import maskable
from smallfry.errors import UsageError
from smallfry.training.method import Method, Setting, register_method

REGULARIZER = 1e-6  # of the Gram matrix, relative to its mean eigenvalue


def transformed_l1(weight: Tensor, a: float = 1.0) -> Tensor:
    """Sum ρ_a over a tensor; its gradient at zero is zero."""
    size = weight.abs()
    return ((a + 1) * size / (a + size)).sum()


def log_am_gm(weight: Tensor, regularizer: float = REGULARIZER) -> Tensor:
    """Compute ½ r log(mean σ²) − Σ log σ of a matrix; 0, without a gradient, of zeros.

    It takes the determinant of the smaller Gram matrix.

    Args:
        weight: (outputs, ...); dimensions after the first are one.
        regularizer: Added to the Gram matrix, times its mean eigenvalue; 0 for none.
    """
    matrix = weight.flatten(1)
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    rank, used = len(gram), gram.any()
    identity = torch.eye(rank, dtype=gram.dtype, device=gram.device)
    gram = torch.where(used, gram, identity)
    mean = gram.diagonal().mean()
    determinant = torch.linalg.slogdet(gram + regularizer * mean * identity).logabsdet
    return torch.where(used, rank * mean.log() / 2 - determinant / 2, 0.0)


def log_condition_bound(weight: Tensor, regularizer: float = REGULARIZER) -> Tensor:
    """Compute the bound of log κ by Guggenheimer, Edelman and Johnson; as ``log_am_gm``."""
    return log_am_gm(weight, regularizer) + math.log(2)


def log_condition(weight: Tensor) -> Tensor:
    """Compute log κ = log σ₁ − log σ_r of a matrix, by its singular values; 0 of zeros.

    σ_r counts as σ₁ times the smallest relative step of the numbers at least, as those of a matrix
    with masked rows are zero.
    """
    values: Tensor = torch.linalg.svdvals(weight.flatten(1))
    used = values[0] > 0
    values = torch.where(used, values, 1.0)
    least = torch.finfo(values.dtype).eps * values[0].detach()
    return torch.where(used, values[0].log() - values[-1].clamp(min=least).log(), 0.0)


@register_method
@dataclass(frozen=True)
class TransformedL1:
    """Penalty μ · mean ρ_a(w) on chosen layers, for sparse weights.

    Args:
        strength: μ.
        a: Shape: near 0 it counts weights, and far above it adds their magnitudes.
        include: Shell patterns of layer names.
        exclude: Patterns of layers without the penalty.
        ends: The first layer and the classifier have it too.

    Example:
        >>> from smallfry import compress
        >>> compress.TransformedL1(a=0.5).strength
        0.0001
    """

    name: ClassVar[str] = "transformed_l1"
    trains: ClassVar[bool] = True

    strength: float = 1e-4
    a: float = 1.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ends: bool = False

    def __post_init__(self) -> None:
        if self.strength < 0 or self.a <= 0:
            raise UsageError("transformed_l1.strength is at least 0, and a above 0")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _L1(self)


@register_method
@dataclass(frozen=True)
class ConditionNumber:
    """Penalty on the logarithms of layers' condition numbers.

    Masked weights count as the zeros that they are.

    Args:
        strength: ν, of the mean over layers.
        surrogate: gej, an upper bound of log κ; am_gm, the same without a constant; exact, by
            singular values at each step.
        include: Shell patterns of layer names.
        exclude: Patterns of layers without the penalty.
        ends: The first layer and the classifier have it too.

    Example:
        >>> from smallfry import compress
        >>> compress.ConditionNumber(surrogate="exact").strength
        0.001
    """

    name: ClassVar[str] = "condition_number"
    trains: ClassVar[bool] = True

    strength: float = 1e-3
    surrogate: Literal["gej", "am_gm", "exact"] = "gej"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ends: bool = False

    def __post_init__(self) -> None:
        if self.strength < 0 or self.surrogate not in SURROGATES:
            raise UsageError(
                f"condition_number.strength is at least 0, and surrogate one of {[*SURROGATES]}"
            )

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Condition(self)


SURROGATES = {"gej": log_condition_bound, "am_gm": log_am_gm, "exact": log_condition}


class _L1(Method):
    def __init__(self, settings: TransformedL1) -> None:
        self._settings = settings

    def begin(self, model: nn.Module, setting: Setting) -> None:
        self._names = [*maskable(model, self._settings)]

    def penalty(self, model: nn.Module) -> Tensor:
        parameters = dict(model.named_parameters())
        weights = [parameters[name] for name in self._names]
        total = torch.stack([transformed_l1(each, self._settings.a) for each in weights]).sum()
        return self._settings.strength * total / sum(each.numel() for each in weights)


class _Condition(Method):
    def __init__(self, settings: ConditionNumber) -> None:
        self._settings = settings

    def begin(self, model: nn.Module, setting: Setting) -> None:
        # a single row or column has the condition number 1
        every = maskable(model, self._settings)
        self._names = [n for n, w in every.items() if min(w.flatten(1).shape) > 1]
        if not self._names:
            raise UsageError("condition_number: no chosen layer has two rows and columns")

    def penalty(self, model: nn.Module) -> Tensor:
        parameters = dict(model.named_parameters())
        measure = SURROGATES[self._settings.surrogate]
        values = [measure(parameters[name].float()) for name in self._names]
        return self._settings.strength * torch.stack(values).mean()
