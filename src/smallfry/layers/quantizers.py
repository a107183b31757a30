"""Uniform quantisers: integer codes q of numbers x, and the values s (q − z) that they stand for.

Affine, b bits, unsigned, for activations: q = clamp(round(x / s) + z, 0, 2^b − 1), with the range
extended to contain 0, s = (high − low) / (2^b − 1) and an integer zero point z. Symmetric, signed,
for weights: z = 0, s = max|x| / Q, Q = 2^(b−1) − 1, q = clamp(round(x / s), −Q, Q); the code
−2^(b−1) stays unused. Halves round to even, as in ONNX. A range of zeros has s = 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BITS = range(2, 9)
CANDIDATES = 100  # clipped ranges that the search for the least squared error tries


class Affine(NamedTuple):
    """Scale and zero point of an affine quantiser."""

    scale: Tensor
    zero: Tensor  # whole numbers from 0 to 2^bits − 1


def affine(low: Tensor, high: Tensor, bits: int) -> Affine:
    """Compute the quantiser of a range.

    Args:
        low: Lower ends, any shape.
        high: Upper ends, same shape.
        bits: Bits per code.

    Example:
        >>> import torch
        >>> from smallfry.layers.quantizers import affine
        >>> scale, zero = affine(torch.tensor(-1.0), torch.tensor(2.0), bits=2)
        >>> float(scale), int(zero)
        (1.0, 1)
    """
    most = 2**bits - 1
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    scale = usable((high - low) / most)
    return Affine(scale, (-low / scale).round().clamp(0, most).long())


def usable(scale: Tensor) -> Tensor:
    """Replace scales of 0, and those that vanish in float32, by 1."""
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def encode(values: Tensor, scale: Tensor, zero: Tensor | int, low: int, high: int) -> Tensor:
    """Compute codes, as floating-point numbers from ``low`` to ``high``."""
    return ((values / scale).round() + zero).clamp(low, high)


def round_affine(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round numbers to the values of an affine quantiser."""
    return (encode(values, scale, zero, 0, 2**bits - 1) - zero) * scale


def largest_code(bits: int) -> int:
    """Return Q = 2^(bits−1) − 1."""
    return int(2 ** (bits - 1)) - 1


def symmetric_scale(values: Tensor, bits: int) -> Tensor:
    """Compute the min-max scale of each row, (…, 1) of (…, numbers), in float64."""
    return usable(values.double().abs().amax(-1, keepdim=True) / largest_code(bits))


def least_error_scale(values: Tensor, bits: int) -> Tensor:
    """Search each row's clipped symmetric range for the least squared error.

    Args:
        values: (…, numbers).
        bits: Bits per code.

    Returns:
        Scales (…, 1) in float64: k/100 of the min-max scale, the smallest k on ties.
    """
    full, most = symmetric_scale(values, bits), largest_code(bits)
    wide = values.double()
    best_error = torch.full_like(full, torch.inf)
    best = full
    for k in range(1, CANDIDATES + 1):
        scale = full * (k / CANDIDATES)
        error = (encode(wide, scale, 0, -most, most) * scale - wide).square().sum(-1, keepdim=True)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def grouped(matrix: Tensor, group: int | None) -> Tensor:
    """Divide rows into groups of consecutive inputs.

    Args:
        matrix: (outputs, inputs).
        group: Inputs per group; None for one group of all.

    Returns:
        (outputs, groups, inputs per group), the last group padded with zeros.
    """
    if group is None:
        return matrix.unsqueeze(1)
    short = -matrix.shape[1] % group
    padded = torch.nn.functional.pad(matrix, (0, short))
    return padded.view(len(matrix), -1, group)


def spread(scales: Tensor, shape: torch.Size, group: int | None) -> Tensor:
    """Expand the scales of groups, (outputs, groups), to those of a weight's numbers."""
    if group is None:
        return scales.view(-1, *[1] * (len(shape) - 1))
    inputs = shape[1:].numel()
    return scales.repeat_interleave(group, dim=1)[:, :inputs].reshape(shape)
