"""Bit depth of data sets with more than 8 bits per channel.

Cameras of 10, 12 or 14 bits write files of 16. What is black and white in them is a property of the
data set, not of a picture, and files don't record it.
"""

import warnings
from collections.abc import Iterable

import numpy as np

from smallfry.data.cache import decoded
from smallfry.data.sources import EncodedSplit
from smallfry.errors import AccessError, DataError, SmallfryWarning
from smallfry_runtime.frames import Frame, ImageSize
from smallfry_runtime.images import FULL_DEPTH, bit_depth_of, peak_of

SAMPLED = 256  # streamed images that are looked at to see whether any has more than 8 bits
MEASURED = 4096  # streamed images whose values are looked at if one has


def common_depth(
    found: int, others: Iterable[EncodedSplit], size: ImageSize | Frame, channels: int
) -> int:
    """Determine the bit depth of all splits, with a warning if it is a guess.

    Args:
        found: That of the training images.
        others: The other splits.
        size: Size that images are brought to; see ``smallfry_runtime.images.decode``.
        channels: 1 (grey) or 3 (RGB).
    """
    depths = [decoded(split, size, channels).bit_depth for split in others]
    depth = max(found, *(each for each in depths if each is not None), 0)
    _warn_of_a_guess(depth, "all values")
    return depth


def sampled_depth(split: EncodedSplit) -> int | None:
    """Determine the bit depth of streamed images from a sample; None if at most 8 bits."""
    assert split.shards is not None
    rows = np.arange(len(split.labels))

    def peak(row: int) -> int:
        try:
            encoded = split.read(row)
            if isinstance(encoded, np.ndarray):
                return -1
            return peak_of(encoded, split.locate(row))
        except AccessError:
            raise
        except DataError:
            return -1  # told when its turn comes

    peaks: list[int] = []
    for count in (SAMPLED, MEASURED):
        peaks = list(map(peak, split.shards.spread(rows, count).tolist()))
        if max(peaks, default=-1) < 0:
            return None
    depth = bit_depth_of(max(peaks))
    _warn_of_a_guess(depth, f"the values of {len(peaks):,} images")
    return depth


def warn_of_unlike_images(where: str) -> None:
    """Warn of a split with more than 8 bits per channel where no training image has more."""
    warnings.warn(
        f"{where}: has 16-bit images, unlike the training images: values are assumed to span 0 to "
        f"65,535; set --data.bit_depth if not",
        SmallfryWarning,
        stacklevel=3,
    )


def _warn_of_a_guess(depth: int, of: str) -> None:
    if depth < FULL_DEPTH:
        warnings.warn(
            f"{of} in 16-bit images are below {2**depth:,}, so {depth} bits are assumed, with "
            f"white at {2**depth - 1:,}; if that is wrong, set --data.bit_depth",
            SmallfryWarning,
            stacklevel=3,
        )
