"""Decode every image once: pixels as a memory-mapped array in the user's cache folder.

After the array a file holds a hash of it, which is checked whenever the file is used again.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.data.sources import EncodedSplit
from smallfry.data.threads import in_threads
from smallfry.errors import AccessError, DataError
from smallfry.images import decode, refit

log = logging.getLogger(__name__)

FORMAT = 1  # changes whenever decoding does, so that no old array is taken for a new one
BLOCK = 2**24  # bytes that are hashed at once
HASH_LENGTH = 64  # hexadecimal digits


class Unreadable(NamedTuple):
    """An image that can't be decoded."""

    position: int
    reason: str


def cache_folder() -> Path:
    """``$SMALLFRY_CACHE``, by default ``smallfry`` in the user's cache folder.

    ``~`` is the user's home folder: Dockerfiles and .env files pass it on as it is.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SMALLFRY_CACHE") or Path(home) / "smallfry").expanduser()


def decoded(
    split: EncodedSplit, size: int, channels: int
) -> tuple[NDArray[np.uint8], list[Unreadable]]:
    """Pixels (images, channels, size, size) of a split, and the images that can't be read.

    An unreadable image is left black. Arrays are kept for the next time, unless one was
    unreadable or the split has no fingerprint.

    Raises:
        AccessError: A shard can't be read now.
        DataError: The arrays can't be kept.
    """
    shape = (len(split.labels), channels, size, size)
    if not split.fingerprint:
        images = np.empty(shape, dtype=np.uint8)
        return images, _decode_into(images, split, size, channels)
    file = cache_folder() / f"{split.fingerprint}-{size}x{channels}-v{FORMAT}.npy"
    kept = _load(file, shape)
    if kept is not None:
        return kept, []
    part: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        os.close(descriptor)
        part = Path(name)
        images = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        _claim_space(part)
        log.info("decoding %d images into %s", shape[0], file)
        unreadable = _decode_into(images, split, size, channels)
        if unreadable:
            return np.array(images), unreadable
        images.flush()
        with open(part, "ab") as stream:
            stream.write(content_hash(images).encode())
        os.replace(part, file)
        kept = _map(file, shape)
    except OSError as error:
        raise DataError(
            f"{file.parent}: decoded images can't be kept there ({error}); free space, or name "
            "another folder in the environment variable SMALLFRY_CACHE"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return images if kept is None else kept, []


def _claim_space(file: Path) -> None:
    """Let a full disk fail here: writing to a mapping that has no room kills the process."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def content_hash(array: NDArray[Any]) -> str:
    """A hash of an array's type, shape and values, made in blocks on all cores."""
    values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def of_block(i: int) -> bytes:
        return hashlib.sha256(values[i * BLOCK : (i + 1) * BLOCK].data).digest()

    blocks = in_threads(of_block, 0, -(-values.size // BLOCK))
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + b"".join(blocks)).hexdigest()


def _load(file: Path, shape: Sequence[int]) -> NDArray[np.uint8] | None:
    """The kept array; None if there is none, or if it is not as it was written."""
    images = _map(file, shape)
    if images is None:
        return None
    with open(file, "rb") as stream:
        stream.seek(-HASH_LENGTH, os.SEEK_END)
        written = stream.read()
    if content_hash(images).encode() == written:
        return images
    log.warning("%s: not as it was written (its hash differs); decoding the images again", file)
    return None


def _map(file: Path, shape: Sequence[int]) -> NDArray[np.uint8] | None:
    try:
        # copy-on-write, so that torch may wrap it and nobody can change the file
        images = np.load(file, mmap_mode="c", allow_pickle=False)
        if file.stat().st_size != images.offset + images.nbytes + HASH_LENGTH:
            return None  # cut off, or of an earlier version, without a hash
    except (OSError, ValueError, EOFError, AttributeError):
        return None
    return images if images.shape == tuple(shape) and images.dtype == np.uint8 else None


def _decode_into(
    images: NDArray[np.uint8], split: EncodedSplit, size: int, channels: int
) -> list[Unreadable]:
    def one(i: int) -> Unreadable | None:
        try:
            encoded = split.read(i)
            if isinstance(encoded, np.ndarray):
                images[i] = refit(encoded, size, channels)
            else:
                images[i] = decode(encoded, split.locate(i), size, channels)
        except AccessError:  # another time it may be readable
            raise
        except DataError as error:
            images[i] = 0
            return Unreadable(i, str(error))
        return None

    return [fault for fault in in_threads(one, 0, len(images)) if fault]
