"""Index of one shard: sample positions and labels, without images."""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import AccessError, is_out_of_memory
from smallfry_runtime.names import text_of

MOST_BYTES = 100_000_000  # of one encoded image
OF_THE_CONTENT = (None, errno.EINVAL, errno.EOVERFLOW)  # no number, or a place that no file has

Label = bool | int | float | str


class Block(NamedTuple):
    """Adjacent samples of a shard, read together."""

    samples: int
    bytes: int


class Scanned(NamedTuple):
    """Samples of one shard, in order."""

    names: list[Label]  # the labels that occur
    codes: NDArray[np.int32]  # (samples,), where in names each sample's label is
    blocks: list[Block]
    mark: str  # changes with the content
    spans: NDArray[np.int64]  # (samples, 2), offset and size in a tar file; (0, 2) for parquet
    left_out: list[str]  # what is no sample, and why
    damage: str = ""  # why the shard, or the rest of it, can't be read


NO_SPANS = np.empty((0, 2), np.int64)


def unreadable_shard(reason: str) -> Scanned:
    """Return the index of a shard that can't be read at all."""
    return Scanned([], np.empty(0, np.int32), [], "", NO_SPANS, [], reason)


def is_of_the_system(error: BaseException) -> bool:
    """Return whether a failing disk, too many open files or low memory is at fault."""
    if is_out_of_memory(error):
        return True
    return isinstance(error, OSError) and error.errno not in OF_THE_CONTENT


@contextmanager
def reached(file: Path) -> Iterator[None]:
    """Separate system errors from damage, which would be cached; damage passes through.

    Raises:
        AccessError: The system can't read the file now.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        if not is_of_the_system(error):
            raise
        raise AccessError(
            f"{file}: can't be read now ({str(error) or 'no memory is left'}); try again, and "
            f"remove the file if this persists"
        ) from error


def label_of(value: Any) -> Label | None:
    """Normalise a label of a table for comparison; NaN, and what is no label, is None."""
    if isinstance(value, str):
        return text_of(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    return value if isinstance(value, int | float) else None
