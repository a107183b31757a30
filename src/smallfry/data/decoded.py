"""Splits decoded to pixels of one size."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data.bit_depth import common_depth, warn_of_unlike_images
from smallfry.data.cache import decoded
from smallfry.data.sources import (
    EncodedSplit,
)
from smallfry.data.splits import Split
from smallfry.errors import DataError, SmallfryWarning
from smallfry_runtime.frames import Frame
from smallfry_runtime.images import FULL_DEPTH


class Decoding(NamedTuple):
    """Settings of decoding."""

    size: Frame
    channels: int
    classes: int  # labels are below
    skip_unreadable: bool
    bit_depth: int | None  # None to determine it from the training images


def decode_held_out(split: EncodedSplit, decoding: Decoding) -> Split:
    """Decode a split on the scale of the training images."""
    depth = decoding.bit_depth or FULL_DEPTH
    held, found = decode_split(split, decoding._replace(bit_depth=depth))
    if decoding.bit_depth is None and found is not None:
        warn_of_unlike_images(split.locate(0))
    return held


def decode_training(
    split: EncodedSplit, others: Sequence[EncodedSplit], decoding: Decoding
) -> tuple[Split, Decoding]:
    """Decode the training images, and determine the bit depth for all splits."""
    train, depth = decode_split(split, decoding)
    if decoding.bit_depth is None and depth is not None:
        common = common_depth(depth, others, decoding.size, decoding.channels)
        decoding = decoding._replace(bit_depth=common)
        if common > depth:
            train, _ = decode_split(split, decoding)
    return train, decoding


def decode_split(split: EncodedSplit, decoding: Decoding) -> tuple[Split, int | None]:
    """Decode a split, and determine its bit depth if it exceeds 8 bits per channel."""
    size, channels, classes, skip_unreadable, bit_depth = decoding
    require_labels(split, classes)
    images, unreadable, found = decoded(split, size, channels, bit_depth)
    if unreadable and not skip_unreadable:
        count = len(unreadable)
        them = "it" if count == 1 else f"this and {count - 1} more images that can't be read"
        raise DataError(
            f"{unreadable[0].reason}; fix or remove {them}, or skip such images: "
            f"--data.skip_unreadable true"
        )
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} unreadable images skipped, the first: {unreadable[0].reason}",
            SmallfryWarning,
            stacklevel=3,
        )
    rows = np.setdiff1d(np.arange(len(images)), [fault.position for fault in unreadable])
    return as_split(images, rows.astype(np.int64), split.labels), found


def require_labels(split: EncodedSplit, classes: int) -> None:
    """Require labels within the classes; raises a DataError that names an image."""
    outside = np.flatnonzero((split.labels < 0) | (split.labels >= classes))
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"{split.locate(first)}: label {split.labels[first]} is missing or outside "
            f"0 to {classes - 1} ({len(outside)} such images)"
        )


def as_split(
    images: NDArray[np.uint8], rows: NDArray[np.int64], labels: NDArray[np.int64]
) -> Split:
    """Wrap decoded images as a split."""
    return Split(
        torch.from_numpy(images), torch.from_numpy(rows), torch.from_numpy(labels[rows].copy())
    )
