"""What one pass over a shard finds: where its samples are, and their labels, but no image."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 100_000_000  # of one encoded image

Label = int | str


class Block(NamedTuple):
    """Neighbouring samples of a shard, which are read together."""

    samples: int
    bytes: int


class Scanned(NamedTuple):
    """The samples of one shard, in their order."""

    names: list[Label]  # the labels that occur
    codes: NDArray[np.int32]  # (samples,), where in names each sample's label is
    blocks: list[Block]
    mark: str  # changes with the content
    spans: NDArray[np.int64]  # (samples, 2), offset and size in a tar file; (0, 2) for parquet
    left_out: list[str]  # what is no sample, and why
    damage: str = ""  # why the shard, or the rest of it, can't be read


NO_SPANS = np.empty((0, 2), np.int64)


def unreadable_shard(reason: str) -> Scanned:
    """A shard of which nothing can be read."""
    return Scanned([], np.empty(0, np.int32), [], "", NO_SPANS, [], reason)
