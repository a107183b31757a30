"""Samples of a split in their shards, and a reader of their bytes."""

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.data import parquet_shards, tar_shards
from smallfry.data.shard_scan import MOST_BYTES, reached
from smallfry.errors import DataError

WINDOW = 16_384  # samples
WINDOW_BYTES = 2**28  # of the encoded images of a window


@dataclass(frozen=True)
class Shards:
    """Positions of the samples of a split.

    Samples have numbers, their rows, through all shards in the order of their names. A block is
    what is read at once: a row group of parquet, or some neighbours in a tar file.

    Args:
        files: The shards.
        column: The column with the images; "" for tar files.
        first: (shards + 1,), the row that a shard begins with.
        first_block: (shards + 1,), the block that a shard begins with; rows do not
            determine it, as there are blocks without a sample.
        starts: (blocks + 1,), the row that a block begins with.
        weights: (blocks,), bytes of the images of a block.
        spans: (samples, 2), offset and size of each image in its tar file.
        mark: Changes with the content of the shards, wherever they are.
    """

    files: tuple[Path, ...]
    column: str
    first: NDArray[np.int64]
    first_block: NDArray[np.int64]
    starts: NDArray[np.int64]
    weights: NDArray[np.int64]
    spans: NDArray[np.int64]
    mark: str

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the blocks of samples; of several that begin at a row, the one that holds it."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def shard_of(self, row: int) -> int:
        """Return the shard of a sample."""
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def locate(self, row: int) -> str:
        """Describe the position of a sample, for messages."""
        shard = self.shard_of(row)
        file, number = self.files[shard], row - int(self.first[shard])
        if self.column:
            return f"{file} row {number}"
        return f"{file} sample {number} ({tar_shards.name_at(file, int(self.spans[row, 0]))!r})"

    def spread(self, rows: NDArray[np.int64], count: int, blocks: int = 64) -> NDArray[np.int64]:
        """Spread a sample of rows over a few blocks of all shards."""
        edges = np.searchsorted(rows, self.starts)
        there = np.flatnonzero(edges[1:] > edges[:-1])
        chosen = there[np.linspace(0, len(there) - 1, min(blocks, len(there))).astype(int)]
        each = -(-count // max(1, len(chosen)))
        parts = [rows[edges[b] : edges[b + 1]] for b in chosen]
        spread = [p[np.linspace(0, len(p) - 1, min(each, len(p))).astype(int)] for p in parts]
        return np.concatenate([rows[:0], *spread])


class ShardReader:
    """Reader of encoded images from shards.

    Of parquet, the row groups that were asked for last stay in memory: at most ``window`` samples
    and 256 MiB in all, but at least one row group. Of tar files nothing stays. May be used by
    several threads and copied into other processes.

    Args:
        shards: The shards.
        window: So many samples may stay.
    """

    def __init__(self, shards: Shards, window: int = WINDOW) -> None:
        self.shards, self.window = shards, window
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "window": self.window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def held(self) -> tuple[int, int]:
        """Number of samples, and bytes of images, in memory."""
        parts = list(self._held.values())
        return sum(part.samples for part in parts), sum(part.bytes for part in parts)

    def read_one(self, row: int) -> bytes:
        """Read the bytes of one image; raises as ``read``."""
        return self.read(np.array([row], np.int64))[0]

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Read the bytes of images, in the order of the rows; raises as ``read_in_parts``."""
        found: list[bytes] = [b""] * len(rows)
        for part in self.read_in_parts(rows):
            for i, encoded in part:
                found[i] = encoded
        return found

    def read_in_parts(self, rows: NDArray[np.int64]) -> Iterator[list[tuple[int, bytes]]]:
        """Yield the bytes of images with their positions in ``rows``, 256 MiB or one at a time.

        Raises:
            AccessError: A shard can't be read now.
            DataError: An image is missing or too large, or the shard around it is damaged.
        """
        part: list[tuple[int, bytes]] = []
        held = 0
        for i, encoded in self._read_parquet(rows) if self.shards.column else self._read_tar(rows):
            if part and held + len(encoded) > WINDOW_BYTES:
                yield part
                part, held = [], 0
            part.append((i, encoded))
            held += len(encoded)
        if part:
            yield part

    def _read_parquet(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        blocks = self.shards.blocks_of(rows)
        for block in dict.fromkeys(blocks.tolist()):  # in the order in which they are needed
            cells = self._block(block)
            for i in np.flatnonzero(blocks == block).tolist():
                row = int(rows[i])
                cell = cells[row - int(self.shards.starts[block])].as_py()
                if cell is None:
                    raise DataError(
                        f"{self.shards.locate(row)}: a label without an image in the table; for "
                        f"images in separate files use --data.stream false"
                    )
                if len(cell) > MOST_BYTES:
                    raise DataError(
                        f"{self.shards.locate(row)}: an image of {len(cell) / 1e6:,.0f} MB; at "
                        f"most {MOST_BYTES / 1e6:.0f} are read"
                    )
                yield i, cell

    def _block(self, block: int) -> Any:
        with self._lock:
            held = self._held.get(block)
            if held is None:
                held = self._load(block)
                self._held[block] = held
            self._held.move_to_end(block)
            while len(self._held) > 1:
                samples, size = self.held
                if samples <= self.window and size <= WINDOW_BYTES:
                    break
                self._held.popitem(last=False)
            return held.cells

    def _load(self, block: int) -> "_Held":
        shards = self.shards
        start, stop = (int(row) for row in shards.starts[block : block + 2])
        shard = shards.shard_of(start)
        group = block - int(shards.first_block[shard])
        cells = parquet_shards.read_group(shards.files[shard], group, shards.column)
        if len(cells) != stop - start:
            raise DataError(
                f"{shards.files[shard]}: row group {group} has {len(cells)} images, but "
                f"{stop - start} when indexed; the file may have changed since"
            )
        return _Held(cells, stop - start, int(shards.weights[block]))

    def _read_tar(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        shards = self.shards
        at = np.searchsorted(shards.first, rows, side="right") - 1
        for shard in np.unique(at).tolist():
            with reached(shards.files[shard]), io.FileIO(shards.files[shard]) as file:
                for i in np.flatnonzero(at == shard).tolist():
                    offset, size = (int(number) for number in shards.spans[rows[i]])
                    try:
                        encoded = tar_shards.read_span(file, offset, size)
                    except DataError as error:
                        raise DataError(f"{shards.locate(int(rows[i]))}: {error}") from None
                    yield i, encoded


class _Held(NamedTuple):
    """Block of samples in memory."""

    cells: Any  # a pyarrow array of bytes
    samples: int
    bytes: int
