"""Blocks with one-hot inputs: an embedding as a linear map of its index.

With input e_i, E[e eᵀ] is diagonal, and so is every input factor that is fitted to the samples'
gradients row by row: only the diagonal blocks F_ii of the Fisher, the second moments of the
gradient of one row, are looked at. Nothing is as large as vocabulary · uses: of a one-hot input its
number is kept. For one number in each sample (a class, or with sharing "expand" always) F is block
diagonal, and this is all of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.curvature.embedding_rows import one_hot
from smallfry.curvature.rows import Rows

MOST_ITERATIONS = 100  # of the power iteration


class RowSums(NamedTuple):
    """Gradients of embedding rows: F_ii = 1/samples Σ h hᵀ over the samples with index i."""

    numbers: Tensor  # (count,)
    gradients: Tensor  # (count, outputs)


class DiagonalProduct(NamedTuple):
    """diag(inputs) ⊗ outputs."""

    inputs: Tensor  # (groups, inputs)
    outputs: Tensor  # (groups, outputs, outputs)


def frequencies(rows: Rows, size: int) -> Tensor:
    """Compute the diagonal of A, the weighted mean of a aᵀ over samples and uses; (1, size).

    Args:
        rows: Numbered inputs, (1, samples, uses, 1); negative for zeros.
        size: Size of the one-hot inputs.
    """
    numbers = rows.inputs[0, :, :, 0]
    weights = torch.ones_like(numbers) if rows.weights is None else rows.weights.to(numbers)
    there = numbers >= 0
    found = numbers.new_zeros(size).index_add_(0, numbers[there].long(), weights[there])
    return found[None] / numbers.numel()


def row_sums(rows: Rows, size: int, whole: bool) -> RowSums:
    """Sum the gradients of embedding rows, for each sample and draw.

    Args:
        rows: Numbered inputs.
        size: Size of the one-hot inputs.
        whole: True to add up a sample's uses of one row, False to count them as samples.
    """
    gradients = rows.gradients[0]  # (draws, samples, uses, outputs)
    draws, samples, uses, _ = gradients.shape
    numbers = rows.inputs[0, :, :, 0].long().expand(draws, samples, uses)
    there = numbers >= 0
    flat, kept = gradients[there], numbers[there]
    if not whole or uses == 1:
        return RowSums(kept, flat)
    sample = torch.arange(draws * samples, device=flat.device).reshape(draws, samples, 1)
    keys, place = torch.unique((sample * size + numbers)[there], return_inverse=True)
    return RowSums(keys % size, flat.new_zeros(len(keys), flat.shape[1]).index_add_(0, place, flat))


def second_moments(sums: RowSums, basis: Tensor, size: int, samples: float) -> Tensor:
    """Compute mean squares of all rows' gradients in a basis of the outputs, (1, outputs, size)."""
    squares = (sums.gradients @ basis[0]) ** 2
    found = squares.new_zeros(size, squares.shape[1]).index_add_(0, sums.numbers, squares)
    return found.T[None] / samples


def nearest_product(
    sums: RowSums,
    size: int,
    samples: float,
    stored: DiagonalProduct | None = None,
    keep: float = 0.0,
) -> DiagonalProduct:
    """Find the diag(a) ⊗ S nearest to the blocks F_ii, with S of norm 1.

    It is the leading singular pair of the matrix whose rows are the F_ii, flattened: a power
    iteration, begun at the sum of all. All of a and S's eigenvalues stay at 0 or above.

    Args:
        sums: Sums over the batch.
        size: Size of the one-hot inputs.
        samples: In the batch.
        stored: An operator to average with.
        keep: Its share.
    """
    numbers, h = sums
    share = (1 - keep) / samples

    def outputs(a: Tensor) -> Tensor:
        found = (h * a[numbers, None]).T @ h * share
        if stored is not None:
            found = found + keep * (stored.inputs[0] @ a) * stored.outputs[0]
        return found

    def inputs(s: Tensor) -> Tensor:
        found = h.new_zeros(size).index_add_(0, numbers, ((h @ s) * h).sum(1)) * share
        if stored is not None:
            found = found + keep * (stored.outputs[0] * s).sum() * stored.inputs[0]
        return found

    tolerance = 1e-13 if h.dtype == torch.float64 else 1e-6
    s = outputs(h.new_ones(size))
    s = s / _norm(s)
    for _ in range(MOST_ITERATIONS):
        a = inputs(s)
        following = outputs(a / _norm(a))
        following = following / _norm(following)
        near = float(_norm(following - s)) <= tolerance
        s = following
        if near:
            break
    return DiagonalProduct(inputs(s)[None], s[None])


def spelled_out(rows: Rows, size: int) -> Rows:
    """Expand indices to one-hot rows."""
    return rows._replace(inputs=one_hot(rows.inputs[..., 0], size, rows.inputs.dtype))


def joined_sums(found: Sequence[RowSums]) -> RowSums:
    """Join the sums of several micro-batches."""
    return RowSums(*(torch.cat(each) for each in zip(*found, strict=True)))


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.clamp_min(torch.finfo(tensor.dtype).tiny)
