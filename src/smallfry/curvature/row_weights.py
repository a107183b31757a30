"""Row weights of a loss, inferred from its gradient at the model's outputs.

A loss Σ_i ρ_i nll(z_i, y_i) over rows i (samples, tokens, pixels) brings g_i = ρ_i (p_i − t_i) to
the logits. A row that the loss leaves out (``ignore_index``, a padding mask, a slice) has g_i = 0.
Where a target is certain, every class but the target's has g_ik = ρ_i p_ik, which gives ρ_i: class
weights, sample weights and the normaliser of the mean need not be stated. Soft targets (label
smoothing, mixing) hide ρ_i; their rows weigh the same, unless weights are given.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

EQUAL = 1e-3  # relative difference of weights that rounding explains


class RowWeights(NamedTuple):
    """Weights of the rows of one output."""

    values: Tensor | None  # broadcastable to the output, 1 on average where not 0; None for ones
    unit: float | None  # ρ of a row with value 1; None where targets may be soft
    given: bool = False  # stated by the user, not read

    def of_samples(self, count: int) -> Tensor | None:
        """Return the mean weight of each sample's counted rows, (samples,); None for ones."""
        if self.values is None:
            return None
        rows = self.values.reshape(count, -1).double()
        return rows.sum(1) / (rows > 0).sum(1).clamp_min(1)


def common_weight(rho: Tensor, error: Tensor) -> float | None:
    """Return the common ρ of all rows; None where they differ by more than rounding.

    Args:
        rho: ρ of each row.
        error: Rounding error of each; rows with little of it decide.
    """
    rho, error = rho.double(), error.double()
    if rho.numel() == 0:
        return None
    trust = (error + EQUAL * rho).square().reciprocal()
    level = (trust * rho).sum() / trust.sum()
    even = ((rho - level).abs() <= EQUAL * level + error).all()
    return float(level) if bool(even) else None


def rounding_of(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound the rounding error of each entry of a gradient.

    Args:
        gradient: Any numbers.
        dtype: The precision, whose smallest numbers are rounded in whole steps.
    """
    info = torch.finfo(dtype)
    return gradient.abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2


def read_weights(
    rho: Tensor, counts: Tensor, certain: bool, error: Tensor | None = None
) -> RowWeights | None:
    """Combine row weights inferred from each row's gradient.

    Args:
        rho: ρ of each row, any number where unknown.
        counts: Rows with a gradient, of the same shape.
        certain: All targets are, so that ρ is known.
        error: Rounding error of each ρ; default none.

    Returns:
        None if no row counts.
    """
    if not bool(counts.any()):
        return None
    everywhere = bool(counts.all())
    if not certain:
        return RowWeights(None if everywhere else counts.to(rho), None)
    error = torch.zeros_like(rho) if error is None else error
    level = common_weight(rho[counts], error[counts])
    if level is not None:
        return RowWeights(None if everywhere else counts.to(rho), level)
    unit = float(rho[counts].double().mean())
    return RowWeights(torch.where(counts, rho / unit, 0.0), unit)


def given_weights(weights: Tensor, output: Tensor, classes: int | None) -> RowWeights:
    """Convert user-given row weights.

    Args:
        weights: ρ of each row: (samples,), or the output's shape (without its classes).
        output: The output that they belong to.
        classes: Dimension of the classes, of which all have one weight; None for no such.

    Raises:
        ValueError: The shape is none of these, or a weight is negative or not finite.
    """
    shape = list(output.shape)
    if classes is not None:
        shape[classes] = 1
    weights = weights.detach().to(output.device, torch.float64)
    whole = [n for d, n in enumerate(shape) if classes is None or d != classes % output.ndim]
    if list(weights.shape) == whole:
        values = weights.reshape(shape)
    elif weights.shape == output.shape[:1]:
        values = weights.reshape(-1, *[1] * (output.ndim - 1)).expand(shape)
    else:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} for an output of shape {tuple(output.shape)}"
            f": expected {tuple(whole)}, or ({shape[0]},) for samples"
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool((weights > 0).any()):
        raise ValueError("weights must be finite, non-negative, and not all zero")
    unit = float(values[values > 0].mean())
    return RowWeights((values / unit).to(output.dtype), unit, given=True)


class CertainRows(NamedTuple):
    """Rows of a categorical likelihood; each tensor is (…)."""

    rho: Tensor
    error: Tensor  # that rounding may have put into ρ
    fits: Tensor  # the target is evidently certain
    telling: Tensor  # a soft one would show


def certain_rows(p: Tensor, g: Tensor, dtype: torch.dtype) -> CertainRows:
    """Compute ρ of each row of a categorical likelihood, and the rows with a certain target.

    Args:
        p: Probabilities, (…, classes).
        g: Gradient at the logits, (…, classes).
        dtype: The precision that the gradient had; perhaps log p and p, too, from which it came.
    """
    tiny = torch.finfo(p.dtype).tiny
    up, g = g > 0, g.to(p)
    mass = (p * up).sum(-1).clamp_min(tiny)
    rho = (g * up).sum(-1) / mass
    rounding = rounding_of(g * (2 - p.clamp_min(tiny).log()), dtype)
    error = (rounding * up).sum(-1)
    off = ((g - rho[..., None] * p) * up).abs().sum(-1)
    fits = (off <= 2e-3 * rho * mass + 2 * error) & ((g < 0).sum(-1) == 1)
    # with two classes, or one left of them, any ratio is that of a certain target
    telling = ((p * up).amax(-1) < 0.999 * mass) & (mass > max(1e-4, torch.finfo(dtype).eps))
    return CertainRows(rho, error / mass, fits, telling)


def with_certain_rows(found: RowWeights | None, p: Tensor, dtype: torch.dtype) -> RowWeights | None:
    """Count rows of certain predictions whose gradient underflows; they have no curvature.

    Args:
        found: Row weights of a categorical likelihood, (…).
        p: Probabilities, (…, classes).
        dtype: Precision of the gradient.
    """
    if found is None or found.values is None:
        return found
    others = 1 - one_hot(p.argmax(-1), p.shape[-1])
    certain = (p * others).sum(-1) < torch.finfo(dtype).smallest_normal
    values = torch.where(certain & (found.values == 0), 1.0, found.values)
    return found._replace(values=None if bool((values == 1).all()) else values)
