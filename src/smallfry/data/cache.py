"""Pixel cache: every image is decoded once, into a memory-mapped array on disk.

After the array a file holds a hash of it, which is checked whenever the file is used again.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from smallfry.data.sources import EncodedSplit
from smallfry.data.threads import in_threads
from smallfry.errors import AccessError, DataError
from smallfry_runtime.frames import Frame, ImageSize, frame_of
from smallfry_runtime.images import BIT_DEPTHS, FULL_DEPTH, bit_depth_of, decode_with_peak, refit

log = logging.getLogger(__name__)

FORMAT = 2  # changes whenever decoding does, so that no old array is taken for a new one
BLOCK = 2**24  # bytes that are hashed at once
HASH_LENGTH = 64  # hexadecimal digits


class Unreadable(NamedTuple):
    """Undecodable image."""

    position: int
    reason: str


class Decoded(NamedTuple):
    """Decoded images of a split."""

    images: NDArray[np.uint8]  # (images, channels, height, width), an unreadable one black
    unreadable: list[Unreadable]
    bit_depth: int | None  # of those of more than 8 bits per channel; None if there are none


def cache_folder() -> Path:
    """Return ``$SMALLFRY_CACHE``, by default ``smallfry`` in the user's cache folder.

    ``~`` is the user's home folder: Dockerfiles and .env files pass it on as it is.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SMALLFRY_CACHE") or Path(home) / "smallfry").expanduser()


def decoded(
    split: EncodedSplit, size: ImageSize | Frame, channels: int, bit_depth: int | None = None
) -> Decoded:
    """Decode the images of a split to pixels, cached for the next time.

    They are not kept if one was unreadable or the split has no fingerprint.

    Args:
        split: The split.
        size: Size that images are brought to; see ``smallfry_runtime.images.decode``.
        channels: 1 (grey) or 3 (RGB).
        bit_depth: Bit depth of images of more than 8 bits; default the smallest usual one that
            has the values of all.

    Raises:
        AccessError: A shard can't be read now.
        DataError: The arrays can't be kept.
    """
    frame = frame_of(size)
    shape = (len(split.labels), *frame.shape(channels))
    if not split.fingerprint:
        images = np.empty(shape, dtype=np.uint8)
        return Decoded(images, *_decode_into(images, split, frame, channels, bit_depth))
    kind = frame.size if frame.is_plain else "-".join(map(str, frame))
    name = f"{split.fingerprint}-{kind}x{channels}-v{FORMAT}"
    for found, ending in _endings(bit_depth):
        kept = _load(cache_folder() / f"{name}{ending}.npy", shape)
        if kept is not None:
            return Decoded(kept, [], found)
    part: Path | None = None
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(descriptor)
        part = Path(temporary)
        images = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        _claim_space(part)
        log.info("decoding %d images into %s", shape[0], folder)
        unreadable, found = _decode_into(images, split, frame, channels, bit_depth)
        if unreadable:
            return Decoded(np.array(images), unreadable, found)
        images.flush()
        with open(part, "ab") as stream:
            stream.write(content_hash(images).encode())
        ending = next(end for depth, end in _endings(bit_depth) if depth == found)
        file = folder / f"{name}{ending}.npy"
        os.replace(part, file)
        kept = _map(file, shape)
    except OSError as error:
        raise DataError(
            f"{folder}: decoded images can't be cached there ({error}); free space, or set "
            f"another folder in the environment variable SMALLFRY_CACHE"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return Decoded(images if kept is None else kept, [], found)


def _endings(bit_depth: int | None) -> list[tuple[int | None, str]]:
    """List the bit depths of cached images with their file suffixes."""
    if bit_depth is None:
        return [(None, ""), *((depth, f"-found{depth}bit") for depth in BIT_DEPTHS)]
    same = [(bit_depth, f"-found{bit_depth}bit")]  # where it was not given, and the same was found
    return [(None, ""), (bit_depth, f"-{bit_depth}bit"), *same]


def _claim_space(file: Path) -> None:
    """Allocate disk space up front: writing to a mapping on a full disk kills the process."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def content_hash(array: NDArray[Any]) -> str:
    """Hash an array's type, shape and values, in blocks on all cores."""
    values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def of_block(i: int) -> bytes:
        return hashlib.sha256(values[i * BLOCK : (i + 1) * BLOCK].data).digest()

    blocks = in_threads(of_block, 0, -(-values.size // BLOCK))
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + b"".join(blocks)).hexdigest()


def _load(file: Path, shape: Sequence[int]) -> NDArray[np.uint8] | None:
    """Load the cached array; None if it is missing or damaged."""
    images = _map(file, shape)
    if images is None:
        return None
    with open(file, "rb") as stream:
        stream.seek(-HASH_LENGTH, os.SEEK_END)
        written = stream.read()
    if content_hash(images).encode() == written:
        return images
    log.warning("%s: damaged (its hash differs); decoding the images again", file)
    return None


def _map(file: Path, shape: Sequence[int]) -> NDArray[np.uint8] | None:
    try:
        # copy-on-write, so that torch may wrap it and nobody can change the file
        images = np.load(file, mmap_mode="c", allow_pickle=False)
        if file.stat().st_size != images.offset + images.nbytes + HASH_LENGTH:
            return None  # cut off, or of an earlier version, without a hash
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile):
        return None
    return images if images.shape == tuple(shape) and images.dtype == np.uint8 else None


def _decode_into(
    images: NDArray[np.uint8],
    split: EncodedSplit,
    frame: Frame,
    channels: int,
    bit_depth: int | None,
) -> tuple[list[Unreadable], int | None]:
    """Fill the array; return unreadable images, and the bit depth if any exceeds 8."""
    peaks = np.full(len(images), -1)
    depth = bit_depth or FULL_DEPTH

    def one(i: int) -> Unreadable | None:
        try:
            encoded = split.read(i)
            if isinstance(encoded, np.ndarray):
                images[i] = refit(encoded, frame, channels)
            else:
                images[i], peaks[i] = decode_with_peak(
                    encoded, split.locate(i), frame, channels, depth
                )
        except AccessError:  # another time it may be readable
            raise
        except DataError as error:
            images[i] = 0
            return Unreadable(i, str(error))
        return None

    unreadable = [fault for fault in in_threads(one, 0, len(images)) if fault]
    wide = np.flatnonzero(peaks >= 0)
    if len(wide) == 0:
        return unreadable, None
    if bit_depth is None:
        depth = bit_depth_of(int(peaks.max()))
    if depth != (bit_depth or FULL_DEPTH):
        again = in_threads(lambda number: one(int(wide[number])), 0, len(wide))
        unreadable += [fault for fault in again if fault]
    return unreadable, depth
