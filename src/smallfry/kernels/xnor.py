"""Products of signs by XOR and population count, 64 in a word.

With bits (v + 1) / 2, Σ a w = n − 2 popcount(a xor w) over n pairs. Padding has the value 0,
neither sign: taps outside the image are left out, and n is the number of the others. Unused bits of
the last word are 0 on both sides.
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def pack_signs(values: NDArray[np.floating]) -> Words:
    """Pack the signs of the last axis, that of 0 being +: (…, n) to (…, ⌈n / 64⌉)."""
    missing = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % 64)]
    bits = np.pad(values >= 0, missing)
    packed: Words = np.packbits(bits, axis=-1, bitorder="little").view("<u8").astype(np.uint64)
    return packed


def binary_conv2d(
    inputs: Words, weight: Words, channels: int, stride: int = 1, padding: int = 0
) -> NDArray[np.int64]:
    """Convolve packed images; channels are innermost, as ``pack_signs`` packs them.

    Args:
        inputs: (batch, height, width, words).
        weight: (outputs, kernel height, kernel width, words).
        channels: Channels of the images.
        stride: Step in both directions.
        padding: Zeros on all sides.

    Returns:
        (batch, height, width, outputs), whole numbers.
    """
    batch, height, width, words = inputs.shape
    rows, columns = (
        (size + 2 * padding - kernel) // stride + 1
        for size, kernel in zip((height, width), weight.shape[1:3], strict=True)
    )
    outputs = np.zeros((batch, rows, columns, len(weight)), np.int64)
    for i in range(weight.shape[1]):
        for j in range(weight.shape[2]):
            ys, y = _valid(i - padding, rows, stride, height)
            xs, x = _valid(j - padding, columns, stride, width)
            part = inputs[:, y, x]
            distance = _distance(part.reshape(-1, words), weight[:, i, j])
            outputs[:, ys, xs] += channels - 2 * distance.reshape(*part.shape[:3], -1)
    return outputs


def _distance(inputs: Words, weight: Words) -> NDArray[np.int64]:
    """Count the differing bits of all pairs of rows."""
    found = np.zeros((len(inputs), len(weight)), np.int64)
    for word in range(inputs.shape[1]):
        found += np.bitwise_count(inputs[:, None, word] ^ weight[None, :, word])
    return found


def _valid(offset: int, outputs: int, stride: int, size: int) -> tuple[slice, slice]:
    """Return the outputs whose tap lies in the image, and the places of the taps."""
    first = max(0, -(offset // stride))
    last = min(outputs - 1, (size - 1 - offset) // stride)
    start = first * stride + offset
    stop = last * stride + offset + 1
    return slice(first, max(first, last + 1)), slice(start, max(start, stop), stride)
