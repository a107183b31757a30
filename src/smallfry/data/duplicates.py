"""Duplicate images across splits or labels, found by pixel hash."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smallfry.data.threads import in_threads

AT_ONCE = 1024  # images that are hashed by one thread


class Hashed(NamedTuple):
    """Image hashes and labels of a split."""

    split: str
    hashes: NDArray[np.uint64]  # (images,), of the pixels
    labels: NDArray[np.int64]  # (images,)
    locate: Callable[[int], str]  # where the i-th image of the split is


def image_hashes(pixels: Tensor, rows: Tensor) -> NDArray[np.uint64]:
    """Hash images (any, channels, size, size) at some rows to 64 bits each, (images,)."""

    def some(i: int) -> NDArray[np.uint64]:
        images = pixels[rows[i * AT_ONCE : (i + 1) * AT_ONCE]].numpy()
        digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
        return np.frombuffer(b"".join(digests), dtype=np.uint64)

    parts = in_threads(some, 0, -(-len(rows) // AT_ONCE))
    return np.concatenate([np.empty(0, np.uint64), *parts])


def describe_duplicates(origin: str, splits: Sequence[Hashed], classes: Sequence[str]) -> list[str]:
    """Describe images shared by two splits, and images with several labels.

    Args:
        origin: Origin of the data.
        splits: Training, validation and test split, in this order.
        classes: Names of the classes.
    """
    pairs = [(a, b) for i, a in enumerate(splits) for b in splits[i + 1 :]]
    told = [sentence for a, b in pairs if (sentence := _shared(origin, a, b))]
    several = _under_several_labels(origin, splits, classes)
    remedy = "--data.remove_duplicates true takes them out of the training split, or mend the data"
    return [f"{sentence}; {remedy}" for sentence in [*told, several] if sentence]


def kept_without_duplicates(
    split: Hashed, later: Sequence[Hashed], unambiguous: bool
) -> NDArray[np.int64]:
    """Return the positions of the images that are in no later split.

    Args:
        split: The split.
        later: The splits that keep their images.
        unambiguous: Also leave out images that the split has under several labels.
    """
    taken = np.concatenate([np.empty(0, np.uint64), *(other.hashes for other in later)])
    keep = ~np.isin(split.hashes, taken)
    if unambiguous:
        keep &= ~np.isin(split.hashes, _ambiguous(split.hashes, split.labels))
    return np.flatnonzero(keep)


def _shared(origin: str, first: Hashed, second: Hashed) -> str:
    both = np.flatnonzero(np.isin(second.hashes, first.hashes))
    if not len(both):
        return ""
    there = int(both[0])
    here = int(np.flatnonzero(first.hashes == second.hashes[there])[0])
    return (
        f"{origin}: {len(both):,} of {len(second.hashes):,} {second.split} images are in the "
        f"{first.split} split too, such as {second.locate(there)}, the same as "
        f"{first.locate(here)}"
    )


def _ambiguous(hashes: NDArray[np.uint64], labels: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the hashes with several labels."""
    order = np.lexsort((labels, hashes))
    same = hashes[order][1:] == hashes[order][:-1]
    other = labels[order][1:] != labels[order][:-1]
    return np.unique(hashes[order][1:][same & other])


def _under_several_labels(origin: str, splits: Sequence[Hashed], classes: Sequence[str]) -> str:
    hashes = np.concatenate([split.hashes for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    ambiguous = _ambiguous(hashes, labels)
    if not len(ambiguous):
        return ""
    places = [(split, i) for split in splits for i in range(len(split.hashes))]
    found = np.flatnonzero(hashes == ambiguous[0])
    first, *rest = found.tolist()
    second = next(i for i in rest if labels[i] != labels[first])
    named = " and ".join(
        f"{places[i][0].locate(places[i][1])} ({classes[labels[i]]})" for i in (first, second)
    )
    return f"{origin}: {len(ambiguous):,} images have several labels, such as {named}"
