"""Packed files: another file, bit for bit, with its integers under an entropy coder.

    "SFPACK1\\n"  checksum (CRC-32 of all that follows)  length of the header  header
    the rest of the original under zlib  one payload for each run of integers

The header, JSON under zlib, has the length and the hash of the original and its runs of 8-bit
integers, each with its offset in the original. A device needs neither PyTorch nor the format of
the original; weights (safetensors) are packed in this way.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smallfry_runtime.errors import DataError
from smallfry_runtime.files import MOST_TEXT, MOST_WEIGHTS, parse_json, read_bytes
from smallfry_runtime.integer_models import CODERS, Coded, decode_integers, work_of
from smallfry_runtime.rans import is_justified

MAGIC = b"SFPACK1\n"
HEAD = len(MAGIC) + 8
MOST_RATIO = 2000  # of the original to the packed file, beyond which a file is hostile
WIDEST = 256  # values of 8 bits


class Run(NamedTuple):
    """Run of coded 8-bit integers in the original."""

    offset: int
    coded: Coded
    length: int  # of the payload, in bytes


def unpack(data: bytes) -> bytes:
    """Restore the original of a packed file.

    Args:
        data: Content of the packed file.

    Raises:
        DataError: Not a packed file, truncated or altered, or of more work than its bytes justify.

    Example:
        >>> from smallfry.compress.coding.packing import pack
        >>> from smallfry_runtime.packed import unpack
        >>> original = bytes(1000) + b"the end"
        >>> unpack(pack(original, []).data) == original
        True
    """
    if not is_packed(data):
        raise DataError("not a packed file of smallfry")
    if zlib.crc32(data[HEAD - 4 :]) != int.from_bytes(data[HEAD - 8 : HEAD - 4], "little"):
        raise DataError("the packed file is truncated or altered: its checksum is wrong")
    try:
        return _unpack(data)
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
        raise DataError(f"the packed file is damaged ({error})") from error


def unpack_file(source: str | Path, target: str | Path | None = None) -> bytes:
    """Restore the original of a packed file, and write it if ``target`` is given.

    Raises:
        DataError: It can't be read, or see ``unpack``.
    """
    try:
        original = unpack(read_bytes(Path(source), MOST_WEIGHTS))
        if target is not None:
            Path(target).write_bytes(original)
    except (DataError, OSError) as error:
        raise DataError(f"{source}: {error}") from error
    return original


def is_packed(data: bytes) -> bool:
    """Return whether these are the first bytes, or all, of a packed file."""
    return data.startswith(MAGIC) and len(data) >= HEAD


def write_packed(original: bytes, runs: Sequence[Run], payloads: Sequence[bytes]) -> bytes:
    """Write a packed file.

    Args:
        original: The whole original.
        runs: What is coded of it, in the order of offsets.
        payloads: Their coded bytes.
    """
    rest = bytearray()
    end = 0
    for run in runs:
        rest += original[end : run.offset]
        end = run.offset + run.coded.integers
    rest += original[end:]
    squeezed = zlib.compress(bytes(rest), 9)
    content = {
        "bytes": len(original),
        "sha256": hashlib.sha256(original).hexdigest(),
        "rest": len(squeezed),
        "runs": [[run.offset, *run.coded, run.length] for run in runs],
    }
    header = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)
    body = b"".join([len(header).to_bytes(4, "little"), header, squeezed, *payloads])
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def _unpack(data: bytes) -> bytes:
    size = int.from_bytes(data[HEAD - 4 : HEAD], "little")
    content = parse_json(inflated(data[HEAD : HEAD + size], MOST_TEXT))
    total, runs = content["bytes"], [_run(each) for each in content["runs"]]
    if type(total) is not int or not 0 <= total <= MOST_RATIO * len(data):
        raise ValueError(f"an original of {total} bytes")
    position = HEAD + size + content["rest"]
    rest = inflated(data[HEAD + size : position], total)
    payloads = []
    for run in runs:
        payloads.append(data[position : position + run.length])
        position += run.length
    work = sum(work_of(run.coded, each) for run, each in zip(runs, payloads, strict=True))
    if not is_justified(work, len(data)):
        raise ValueError(f"{work / 1e9:.0f} s of decoding are too much for {len(data)} bytes")
    original, used, end = bytearray(), 0, 0
    for run, payload in zip(runs, payloads, strict=True):
        gap = run.offset - end
        end = run.offset + run.coded.integers
        if gap < 0 or end > total:
            raise ValueError("runs overlap")
        original += rest[used : used + gap]
        used += gap
        original += (decode_integers(run.coded, payload) & 255).astype(np.uint8).tobytes()
    original += rest[used:]
    if position != len(data) or hashlib.sha256(original).hexdigest() != content["sha256"]:
        raise ValueError("its content is not that of its hash")
    return bytes(original)


def _run(values: Any) -> Run:
    """Parse a run, within what 8-bit integers can be."""
    offset, coder, *numbers, length = values
    count, low, symbols, channels = numbers
    wrong = type(low) is not int
    wrong |= not all(type(n) is int and n >= 0 for n in (offset, count, symbols, length))
    if wrong:
        raise ValueError("a run has no whole numbers")
    if coder not in CODERS or not 1 <= symbols <= WIDEST or not -WIDEST <= low <= WIDEST:
        raise ValueError(f"a run has the unknown form {coder!r}")
    if type(channels) is not int or channels < 1:
        raise ValueError("a run has no channels")
    return Run(offset, Coded(coder, count, low, symbols, channels), length)


def inflated(data: bytes, most: int) -> bytes:
    """Decompress at most so many bytes.

    Raises:
        ValueError: There are more, or the data ends early.
    """
    machine = zlib.decompressobj()
    found = machine.decompress(data, most + 1)
    if len(found) > most or not machine.eof or machine.unused_data:
        raise ValueError("a part has another length")
    return found
