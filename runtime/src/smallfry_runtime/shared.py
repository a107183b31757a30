"""Shared files: a graph of a sub-model without the weights in the full model's graph.

    "SFPART1\\n"  checksum (CRC-32 of all that follows)  length of the header  header
    the rest of the original under zlib

The header, JSON under zlib, has the length and the hash of the original, and where its weights are
in the base: of a tensor of float32 the first values of each of a number of equal blocks, axis by
axis, as of the first channels or of the first channels of each head.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import DataError
from smallfry_runtime.files import MOST_TEXT, parse_json
from smallfry_runtime.packed import inflated

MAGIC = b"SFPART1\n"
HEAD = len(MAGIC) + 8
MOST_AXES = 8
MOST_BYTES = 2**31


class Part(NamedTuple):
    """Weights of a file as a part of a tensor in the base."""

    offset: int  # in the original
    base_offset: int
    full: tuple[int, ...]  # shape in the base
    shape: tuple[int, ...]
    blocks: tuple[int, ...]  # of each axis


def part_of(full: NDArray[Any], shape: Sequence[int], blocks: Sequence[int]) -> NDArray[Any]:
    """Take the first values of each block of a tensor's axes.

    Example:
        >>> import numpy as np
        >>> part_of(np.arange(8), (4,), (2,))  # the first two of both halves
        array([0, 1, 4, 5])
    """
    chosen = []
    for whole, size, count in zip(full.shape, shape, blocks, strict=True):
        length, kept = whole // count, size // count
        if length * count != whole or kept * count != size or kept > length:
            raise ValueError("a part that is no part of its tensor")
        chosen.append((length * np.arange(count)[:, None] + np.arange(kept)).ravel())
    part: NDArray[Any] = full[np.ix_(*chosen)]  # of all axes at once: only what is taken is read
    return part


def write_shared(original: bytes, base: bytes, parts: Sequence[Part]) -> bytes:
    """Write a file that refers to a base.

    Args:
        original: The whole original.
        base: Content of the base.
        parts: What the base has of it, in the order of offsets.
    """
    rest, end = bytearray(), 0
    for part in parts:
        rest += original[end : part.offset]
        end = part.offset + 4 * prod(part.shape)
    rest += original[end:]
    content = {
        "bytes": len(original),
        "sha256": hashlib.sha256(original).hexdigest(),
        "base": hashlib.sha256(base).hexdigest(),
        "parts": [list(part) for part in parts],
    }
    header = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)
    body = len(header).to_bytes(4, "little") + header + zlib.compress(bytes(rest), 9)
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def restore(data: bytes, base: bytes) -> bytes:
    """Restore the original of a shared file.

    Args:
        data: Content of the file.
        base: Content of the base, whose hash it has.

    Raises:
        DataError: Not a shared file, damaged, or of another base.
    """
    if not data.startswith(MAGIC) or len(data) < HEAD:
        raise DataError("not a shared file of smallfry")
    if zlib.crc32(data[HEAD - 4 :]) != int.from_bytes(data[HEAD - 8 : HEAD - 4], "little"):
        raise DataError("the shared file is truncated or altered: its checksum is wrong")
    try:
        size = int.from_bytes(data[HEAD - 4 : HEAD], "little")
        content = parse_json(inflated(data[HEAD : HEAD + size], MOST_TEXT))
        if content["base"] != hashlib.sha256(base).hexdigest():
            raise DataError("the full model's graph is not the one that this sub-model shares")
        total, parts = content["bytes"], [_part(each) for each in content["parts"]]
        if type(total) is not int or not 0 <= total <= MOST_BYTES:
            raise ValueError(f"an original of {total} bytes")
        rest = inflated(data[HEAD + size :], total)
        return _restored(rest, base, parts, total, content["sha256"])
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
        raise DataError(f"the shared file is damaged ({error})") from error


def _restored(rest: bytes, base: bytes, parts: Sequence[Part], total: int, digest: str) -> bytes:
    original, used = bytearray(), 0
    for part in parts:
        gap = part.offset - len(original)
        if gap < 0 or used + gap > len(rest) or part.offset + 4 * prod(part.shape) > total:
            raise ValueError("parts overlap")
        original += rest[used : used + gap]
        used += gap
        full = np.frombuffer(base, "<f4", prod(part.full), part.base_offset).reshape(part.full)
        original += part_of(full, part.shape, part.blocks).tobytes()
    original += rest[used:]
    if hashlib.sha256(original).hexdigest() != digest:
        raise ValueError("its content is not that of its hash")
    return bytes(original)


def _part(values: Any) -> Part:
    """Parse a part, within what a tensor can be."""
    offset, base_offset, *shapes = values
    full, shape, blocks = (tuple(each) for each in shapes)
    numbers = (offset, base_offset, *full, *shape, *blocks)
    if not all(type(each) is int and each >= 0 for each in numbers):
        raise ValueError("a part has no whole numbers")
    if not len(full) == len(shape) == len(blocks) <= MOST_AXES or 0 in (*full, *shape, *blocks):
        raise ValueError("a part has no shape")
    return Part(offset, base_offset, full, shape, blocks)
