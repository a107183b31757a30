"""Streaming of images from shards, shuffled in windows.

An epoch's order is a pure function of a seed, so a run can be resumed at any step, by any number
of processes, and what a process makes of its share is what any other would make of it. The blocks
of all shards, such as row groups of parquet, come in a random order; neighbours in that order make
windows of at most ``window`` samples and 256 MiB; and the samples of a window are shuffled. A
process that goes through its batches holds the blocks of one window.

``datasets.IterableDataset`` reads the same shards with a shuffle buffer, but loses what is in the
buffer when it is resumed, and its order depends on the number of workers.
"""

import json
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from smallfry.data.cache import cache_folder
from smallfry.data.fingerprint import digest, stamp
from smallfry.data.shards import WINDOW_BYTES, ShardReader, Shards
from smallfry.data.threads import in_threads
from smallfry.errors import AccessError, DataError, SmallfryWarning, is_out_of_memory
from smallfry_runtime.files import has_valid_digest, with_digest
from smallfry_runtime.frames import Frame, ImageSize, frame_of
from smallfry_runtime.images import decode

log = logging.getLogger(__name__)

WORTH_THREADS = 2**20  # bytes of encoded images


class ShardPixels:
    """Pixels in shards, indexed by rows like a tensor.

    Args:
        shards: Shards of the images.
        size: Size of the images; see ``smallfry_runtime.images.decode``.
        channels: 1 for grey images, 3 for RGB.
        window: Samples that are shuffled among each other, and that may be in memory at once.
        bit_depth: Bit depth of images of more than 8 bits per channel; None if unknown.
    """

    def __init__(
        self,
        shards: Shards,
        size: ImageSize | Frame,
        channels: int,
        window: int,
        bit_depth: int | None = None,
    ) -> None:
        self.shards, self.window, self.bit_depth = shards, window, bit_depth
        self.frame = frame_of(size)
        self.shape = (len(shards), *self.frame.shape(channels))
        self.reader = ShardReader(shards, window)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read pixels (..., channels, height, width), uint8, of rows of any shape.

        Raises:
            DataError: An image can't be read; the message has its place.
        """
        wanted = rows.reshape(-1).numpy()
        pixels = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        for part in self.reader.read_in_parts(wanted):

            def one(number: int, part: list[tuple[int, bytes]] = part) -> None:
                i, encoded = part[number]
                pixels[i] = self._decode(encoded, int(wanted[i]))

            heavy = sum(len(encoded) for _, encoded in part) > WORTH_THREADS
            if heavy and get_worker_info() is None:
                in_threads(one, 0, len(part))
            else:
                for number in range(len(part)):
                    one(number)
        return torch.from_numpy(pixels).reshape(*rows.shape, *self.shape[1:])

    def order(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Shuffle the positions of ascending rows by windows, (images,)."""
        shards = self.shards
        edges = np.searchsorted(rows.numpy(), shards.starts)
        there = np.flatnonzero(edges[1:] > edges[:-1])
        there = there[torch.randperm(len(there), generator=generator).numpy()]
        counts = torch.from_numpy(edges[there + 1] - edges[there])
        windows = torch.from_numpy(windows_of(shards, there, self.window))
        ends = counts.cumsum(0)
        shift = torch.from_numpy(edges[there]) - (ends - counts)
        positions = torch.arange(len(rows)) + shift.repeat_interleave(counts)
        place = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        place += windows.repeat_interleave(counts)
        return positions[place.argsort(stable=True)]

    def unreadable(self) -> dict[int, str]:
        """Find unreadable rows with the reason; every image is decoded once, and the result cached.

        Raises:
            AccessError: A shard can't be read now, or memory is full; nothing is kept of that.
            DataError: The list can't be cached.
        """
        kind = str(self.frame.size) if self.frame.is_plain else "-".join(map(str, self.frame))
        stamps = map(stamp, self.shards.files)
        depth = [] if self.bit_depth is None else [f"{self.bit_depth} bits"]
        key = digest("unreadable", kind, str(self.shape[1]), *depth, self.shards.mark, *stamps)
        file = cache_folder() / f"{key}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_suffix(".lock")):  # one of several processes looks
                found = _load_faults(file)
                if found is None:
                    log.info("checking %d images for unreadable ones, once", len(self.shards))
                    found = self._faults()
                    _keep_faults(found, file)
                return found
        except OSError as error:
            raise DataError(
                f"{file.parent}: the list of unreadable images can't be cached there ({error}); "
                f"free space, or set another folder in the environment variable SMALLFRY_CACHE"
            ) from error

    def _faults(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for start, stop in zip(self.shards.starts, self.shards.starts[1:], strict=False):
            reasons = in_threads(self._fault, int(start), int(stop))
            found |= {int(start) + i: why for i, why in enumerate(reasons) if why is not None}
        return found

    def _fault(self, row: int) -> str | None:
        try:
            self._decode(self.reader.read_one(row), row)
        except AccessError:
            raise
        except DataError as error:
            return str(error)
        return None

    def _decode(self, encoded: bytes, row: int) -> NDArray[np.uint8]:
        try:
            return decode(encoded, "", self.frame, self.shape[1], self.bit_depth)
        except DataError as error:  # where it is takes a look into the file
            told = f"{self.shards.locate(row)}{error}"
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise AccessError(f"{told}; free memory, or remove the image") from error
            raise DataError(told) from error


def readable_rows(pixels: ShardPixels, skip_unreadable: bool) -> Tensor:
    """Return all rows, or with ``skip_unreadable`` the readable ones and a warning."""
    rows = torch.arange(pixels.shape[0])
    faults = pixels.unreadable() if skip_unreadable else {}
    if faults:
        warnings.warn(
            f"{len(faults)} unreadable images skipped, the first: {min(faults.items())[1]}",
            SmallfryWarning,
            stacklevel=3,
        )
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[torch.tensor(list(faults))] = False
        rows = rows[keep]
    return rows


def _load_faults(file: Path) -> dict[int, str] | None:
    try:
        told = json.loads(file.read_text())
        if not has_valid_digest(told):
            return None
        return {int(row): str(reason) for row, reason in told["faults"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep_faults(found: dict[int, str], file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent, suffix=".part") as place:
        part = Path(place) / file.name
        part.write_text(json.dumps(with_digest({"faults": found})))
        part.replace(file)


def windows_of(shards: Shards, blocks: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Assign blocks to windows (blocks,): as many neighbours as fit, and at least one."""
    samples = np.diff(shards.starts)[blocks].tolist()
    sizes = shards.weights[blocks].tolist()
    windows, number, held, weight = [], 0, 0, 0
    for count, size in zip(samples, sizes, strict=True):
        if held and (held + count > window or weight + size > WINDOW_BYTES):
            number, held, weight = number + 1, 0, 0
        held, weight = held + count, weight + size
        windows.append(number)
    return np.array(windows, np.int64)
