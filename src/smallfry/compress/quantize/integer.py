"""Integer arithmetic of quantised layers in NumPy: the reference for simulation and runtimes.

    acc = Σ (q_x − z_x) q_w + q_b  in 32 bits,    q_b = round(b / (s_x s_w))
    q_y = clamp(round(M acc) + z_y),   M = s_x s_w / s_y = M₀ 2^−(n + 31)

with M₀ in [2^30, 2^31) and a rounding multiplication and shift, as in gemmlowp and TensorFlow Lite
(Jacob et al. 2018, arXiv 1712.05877). No 32-bit overflow while inputs · 255 · 127 < 2^31.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class Multiplier(NamedTuple):
    """Positive factor, mantissa · 2^−(shift + 31)."""

    mantissa: Integers  # in [2^30, 2^31)
    shift: Integers


def multiplier(factor: Floats) -> Multiplier:
    """Represent positive factors by integers.

    Example:
        >>> import numpy as np
        >>> from smallfry.compress.quantize.integer import multiplier
        >>> multiplier(np.array(0.25))
        Multiplier(mantissa=array(1073741824), shift=np.int64(1))
    """
    fraction, exponent = np.frexp(factor)  # fraction in [1/2, 1)
    mantissa = np.round(fraction * 2**31).astype(np.int64)
    full = mantissa == 2**31  # rounded up to the next power of two
    mantissa = np.where(full, 2**30, mantissa)
    return Multiplier(mantissa, -(exponent + full).astype(np.int64))


def rescale(accumulated: Integers, by: Multiplier) -> Integers:
    """Multiply 32-bit sums by a factor, rounding twice, as gemmlowp does: halves go up."""
    left = np.maximum(-by.shift, 0)
    right = np.clip(by.shift, 0, 40)  # of 32-bit sums more leave nothing, and overflow
    product = (accumulated << left) * by.mantissa
    half = np.where(product >= 0, 2**30, 1 - 2**30)
    high = np.where(product + half >= 0, (product + half) >> 31, -((-(product + half)) >> 31))
    rest, mask = high & ((1 << right) - 1), (1 << right) - 1
    threshold = (mask >> 1) + (high < 0)
    result: Integers = (high >> right) + (rest > threshold)
    return result


def linear(
    inputs: Integers,
    zero: int,
    weight: Integers,
    bias: Integers | None,
    factor: Floats,
    output_zero: int,
    bits: int = 8,
) -> Integers:
    """Compute the output codes of a linear layer from integers alone.

    Args:
        inputs: Codes of the inputs, (rows, inputs).
        zero: Their zero point.
        weight: Codes of the weight, (outputs, inputs).
        bias: Integers (outputs,) of scale s_x s_w; None for none.
        factor: s_x s_w / s_y, (outputs,).
        output_zero: Zero point of the outputs.
        bits: Bits of the output codes.

    Raises:
        OverflowError: A sum does not fit 32 bits.
    """
    sums = (inputs.astype(np.int64) - zero) @ weight.astype(np.int64).T
    if bias is not None:
        sums = sums + bias
    if sums.size and np.abs(sums).max() >= 2**31:
        raise OverflowError(f"a sum of {weight.shape[1]} products does not fit 32 bits")
    codes: Integers = np.clip(rescale(sums, multiplier(factor)) + output_zero, 0, 2**bits - 1)
    return codes


def patches(
    images: Integers, kernel: tuple[int, int], stride: int = 1, padding: int = 0, fill: int = 0
) -> Integers:
    """Extract the rows of a convolution, (batch · positions, channels · kernel).

    Args:
        images: (batch, channels, height, width).
        kernel: Height and width.
        stride: Of both dimensions.
        padding: Of both dimensions.
        fill: Code of the padding: the zero point.
    """
    sides = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = np.pad(images, sides, constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, (2, 3))
    chosen = windows[:, :, ::stride, ::stride].transpose(0, 2, 3, 1, 4, 5)
    rows: Integers = chosen.reshape(-1, images.shape[1] * kernel[0] * kernel[1])
    return rows
