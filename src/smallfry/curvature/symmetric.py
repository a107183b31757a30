"""Products whose result, or whose middle, is symmetric: half of it need not be computed.

LAPACK's syrk can't be reached from PyTorch; block columns come close to it, two thirds of the
plain product's work. Batches are leading dimensions.
"""

import torch
from torch import Tensor

_BLOCK = 200  # features; matrices below twice that are multiplied at once


def symmetric_product(x: Tensor, y: Tensor) -> Tensor:
    """Xᵀ Y, which the caller knows to be symmetric: Y = D X with D diagonal or symmetric.

    Args:
        x: (groups, rows, size).
        y: (groups, rows, size).

    Returns:
        (groups, size, size), exactly symmetric.
    """
    size = x.shape[2]
    if size < 2 * _BLOCK:
        full = x.transpose(1, 2) @ y
        return (full + full.transpose(1, 2)) / 2
    result = x.new_empty(x.shape[0], size, size)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        part = x[:, :, start:].transpose(1, 2) @ y[:, :, start:stop]  # this block and below
        result[:, start:, start:stop] = part
        result[:, start:stop, stop:] = part[:, stop - start :].transpose(1, 2)
        corner = part[:, : stop - start]
        result[:, start:stop, start:stop] = (corner + corner.transpose(1, 2)) / 2
    return result


def quadratic_forms(x: Tensor, matrix: Tensor) -> Tensor:
    """xᵀ M x for every row of X.

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
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        own, below = x[:, :, start:stop], x[:, :, stop:]
        total += ((own @ matrix[:, start:stop, start:stop]) * own).sum(2)
        total += 2 * ((below @ matrix[:, stop:, start:stop]) * own).sum(2)
    return total


def random_symmetric(groups: int, count: int, size: int, like: Tensor) -> Tensor:
    """Unit symmetric matrices, the same at every call, (groups, count, size, size)."""
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(groups, count, size, size, generator=generator).to(like)
    matrix = matrix + matrix.transpose(2, 3)
    unit: Tensor = matrix / matrix.flatten(2).norm(dim=2)[:, :, None, None]
    return unit
