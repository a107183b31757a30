"""Products with a symmetric result or middle, at half the arithmetic.

LAPACK's syrk can't be reached from PyTorch; block columns come close to it, two thirds of the
plain product's work. Batches are leading dimensions.
"""

import torch
from torch import Tensor

from smallfry.kernels.onednn import multiplies, multiply

_BLOCK = 160  # features; matrices below twice that are multiplied at once


def symmetric_product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute a product Xᵀ Y known to be symmetric: Y = D X with D diagonal or symmetric.

    Args:
        x: (groups, rows, size).
        y: (groups, rows, size).
        out: Output tensor, (groups, size, size).

    Returns:
        (groups, size, size), exactly symmetric.
    """
    groups, _, size = x.shape
    result = x.new_empty(groups, size, size) if out is None else out
    if size < 2 * _BLOCK:
        full = _times(x[0].T, y[0].T)[None] if groups == 1 else x.transpose(1, 2) @ y
        return torch.add(full, full.transpose(1, 2), out=result).mul_(0.5)
    for matrix, one, other in zip(result, x, y, strict=True):
        a = one.T.contiguous()
        b = a if x is y else other.T.contiguous()
        for start in range(0, size, _BLOCK):
            stop = min(start + _BLOCK, size)
            # these block rows right of the diagonal, then mirrored below it
            matrix[start:stop, start:] = _times(a[start:stop], b[start:])
            corner = matrix[start:stop, start:stop]
            corner.copy_((corner + corner.T) / 2)
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return result


def quadratic_forms(x: Tensor, matrix: Tensor) -> Tensor:
    """Compute xᵀ M x for every row of X.

    Args:
        x: (groups, rows, size).
        matrix: (groups, size, size), symmetric.

    Returns:
        (groups, rows).
    """
    size = x.shape[2]
    if size < 2 * _BLOCK:
        return ((x @ matrix) * x).sum(2)
    total = x.new_zeros(x.shape[:2])
    for sums, rows, m in zip(total, x, matrix, strict=True):
        for start in range(0, size, _BLOCK):
            stop = min(start + _BLOCK, size)
            own = rows[:, start:stop]
            image = _times(own, m[start:stop, start:stop])
            if stop < size:
                image.add_(_times(rows[:, stop:], m[start:stop, stop:]), alpha=2)
            sums += (image * own).sum(1)
    return total


def _times(x: Tensor, y: Tensor) -> Tensor:
    """Compute X Yᵀ of two matrices."""
    if multiplies(x, y):
        return multiply(
            x, y.contiguous()
        )  # of a part of a matrix it makes a thousand times the work
    return x @ y.T


def random_symmetric(groups: int, count: int, size: int, like: Tensor) -> Tensor:
    """Draw fixed unit symmetric matrices, (groups, count, size, size)."""
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(groups, count, size, size, generator=generator).to(like)
    matrix = matrix + matrix.transpose(2, 3)
    unit: Tensor = matrix / matrix.flatten(2).norm(dim=2)[:, :, None, None]
    return unit
