"""Densities of layers, sparsity over time, and masks of N in M: pure functions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cubic_sparsity(first: float, last: float, done: float) -> float:
    """Return v_f + (v_i − v_f)(1 − x)³, the sparsity after a share x of the pruning.

    Zhu, Gupta, arXiv 1710.01878.
    """
    done = min(1.0, max(0.0, done))
    return last + (first - last) * (1 - done) ** 3


def kernel_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Distribute a density over layers in proportion to (Σ sizes)/(Π sizes) (Erdős–Rényi kernel).

    Layers that would be more than dense are dense, and the others share the rest (Evci et al.,
    arXiv 1911.11134).

    Args:
        shapes: Of the weights.
        density: Share of all weights that remain.

    Returns:
        The density of each; the remaining weights sum to the budget.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    budget, dense = density * sum(sizes), [False] * len(sizes)
    while True:
        left = budget - sum(size for size, full in zip(sizes, dense, strict=True) if full)
        parts = [
            size * value for size, value, full in zip(sizes, raw, dense, strict=True) if not full
        ]
        if not parts or sum(parts) == 0:
            return [1.0] * len(sizes)
        scale = left / sum(parts)
        over = [not full and scale * value > 1 for value, full in zip(raw, dense, strict=True)]
        if not any(over):
            return [1.0 if full else scale * v for v, full in zip(raw, dense, strict=True)]
        dense = [a or b for a, b in zip(dense, over, strict=True)]


def update_fraction(alpha: float, step: int, last: int) -> float:
    """Return (α/2)(1 + cos(π t/T)), the share of active weights that RigL moves."""
    return alpha / 2 * (1 + math.cos(math.pi * min(step, last) / max(1, last)))


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Mark the n largest magnitudes of every m consecutive inputs of a row.

    Args:
        weight: (outputs, inputs, ...); dimensions after the first count as inputs.
        n: To keep.
        m: Of so many; inputs left over at a row's end are all kept.

    Returns:
        A mask of the weight's shape.
    """
    rows = weight.detach().abs().flatten(1)
    whole = rows.shape[1] // m * m
    mask = torch.ones_like(rows, dtype=torch.bool)
    groups = rows[:, :whole].reshape(len(rows), whole // m, m)
    order = groups.sort(dim=2, descending=True, stable=True).indices[..., :n]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
    mask[:, :whole] = kept.flatten(1)
    return mask.view_as(weight)
