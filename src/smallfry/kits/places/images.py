"""Patch-normalised images, the input of the modules and of the plain image difference.

Each pixel becomes (value - mean) / deviation of the 7×7 pixels around it, as far as they exist,
clipped to [-1, 1] and brought to 0 … 255.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["firing_rates", "patch_normalise"]

WINDOW = 7
HZ = 0.25  # of an input for each of 255 steps of grey


def patch_normalise(images: NDArray[Any], window: int = WINDOW) -> NDArray[np.float64]:
    """Normalise images (…, height, width) by the mean and deviation around each pixel.

    Args:
        images: Grey values.
        window: Side of the neighbourhood, odd.

    Returns:
        Values in [-1, 1]; 0 where a neighbourhood is constant.
    """
    values = images.astype(np.float64)
    counts = _sums(np.ones(values.shape[-2:]), window)
    # about a constant, so that the difference of squares is exact enough
    centred = values - np.floor(values.mean(axis=(-2, -1), keepdims=True))
    mean = _sums(centred, window) / counts
    variance = np.maximum(_sums(centred**2, window) / counts - mean**2, 0.0)
    variance[variance < 1e-9] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.nan_to_num((centred - mean) / np.sqrt(variance), nan=0.0)
    result: NDArray[np.float64] = np.clip(found, -1, 1)
    return result


def firing_rates(images: NDArray[Any]) -> NDArray[np.float64]:
    """Return the rates of inputs in Hz, (…, height × width), of grey images (…, height, width)."""
    pixels = np.floor(255 * (1 + patch_normalise(images)) / 2)
    return HZ * pixels.reshape(*pixels.shape[:-2], pixels.shape[-2] * pixels.shape[-1])


def _sums(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Sum the existing pixels of the window around each pixel, by running sums."""
    half = window // 2
    for axis in (-2, -1):
        length = values.shape[axis]
        total = np.cumsum(values, axis=axis)
        padded = np.concatenate([np.zeros_like(total.take([0], axis=axis)), total], axis=axis)
        places = np.arange(length)
        above = np.minimum(places + half + 1, length)
        below = np.maximum(places - half, 0)
        values = padded.take(above, axis=axis) - padded.take(below, axis=axis)
    return values
