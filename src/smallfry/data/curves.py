"""Data set ``curves``: synthetic images of smooth curves, each defined by three points.

After the idea of the CURVES of Hinton and Salakhutdinov (Science 313, 2006), which train an
auto-encoder to find the six coordinates behind 784 pixels. Theirs is a file, ``digs3pts_1.mat``;
these are drawn anew by a recipe of our own, of the same size and number and about as much ink.
"""

import numpy as np
from numpy.typing import NDArray

from smallfry.data.fingerprint import digest
from smallfry.data.philox import uniform
from smallfry.data.sources import TEST, TRAIN, EncodedSplit, Source

SIZE = 28
COUNTS = {TRAIN: 20_000, TEST: 10_000}
LOWEST, HIGHEST = 3.0, 25.0  # of the coordinates of the three points
STROKE = 0.58  # standard deviation of the ink across the curve, in pixels
SEGMENTS = 32  # between the chords and the curve are at most 0.04 pixels
RECIPE = 1  # changes whenever the images do, so that no old array is taken for a new one


def read_curves(seed: int = 0) -> Source:
    """Generate 20,000 training and 10,000 test images, uint8, (1, 28, 28), of class ``curve``."""
    splits = {split: _split(split, stream, seed) for stream, split in enumerate(COUNTS)}
    return Source("generated", ("curve",), splits)


def three_points(seed: int, stream: int, i: int) -> NDArray[np.float64]:
    """Draw the points (3, 2), x and y, of the i-th curve of a stream: 0 to train, 1 to test."""
    return LOWEST + (HIGHEST - LOWEST) * uniform(6, seed, stream, i).reshape(3, 2)


def draw(points: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Render pixels (1, 28, 28) of the quadratic curve through three points (3, 2).

    The curve passes them at t = 0, 1/2 and 1. A pixel whose centre is d away from the curve has
    the value exp(-d² / (2 STROKE²)), on the scale 0 to 1.
    """
    t = np.linspace(0.0, 1.0, SEGMENTS + 1)[:, None]
    first, middle, last = points
    curve = (1 - t) * (1 - 2 * t) * first + 4 * t * (1 - t) * middle + t * (2 * t - 1) * last
    step = np.diff(curve, axis=0)  # (segments, 2)
    square = np.maximum((step**2).sum(1), 1e-12)  # not 0 where three equal points make a dot

    centres = np.arange(SIZE)[:, None, None] + 0.5
    x, y = np.moveaxis(centres - curve[:-1], -1, 0)  # (28, segments) each, from a segment's start
    along = x * step[:, 0] + (y * step[:, 1])[:, None]  # (28, 28, segments)
    share = np.clip(along / square, 0.0, 1.0)  # of the segment, to its nearest point
    distance2 = x**2 + (y**2)[:, None] - share * (2 * along - share * square)
    ink: NDArray[np.float64] = np.exp(np.maximum(distance2.min(-1), 0.0) / (-2 * STROKE**2))
    return np.rint(255 * ink).astype(np.uint8)[None]


def _split(split: str, stream: int, seed: int) -> EncodedSplit:
    return EncodedSplit(
        labels=np.zeros(COUNTS[split], dtype=np.int64),
        read=lambda i: draw(three_points(seed, stream, i)),
        locate=lambda i: f"curves, {split}[{i}]",
        fingerprint=digest("curves", split, str(seed), str(RECIPE)),
    )
