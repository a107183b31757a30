"""Bounded readers of regular files from untrusted sources.

A folder may hold a pipe where a file is expected, on which a plain ``open`` waits for ever, or a
sparse file of a terabyte.
"""

import errno
import hashlib
import json
import os
import stat
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from smallfry_runtime.errors import SmallfryError

T = TypeVar("T")
MOST_TEXT = 64 * 2**20  # bytes of a manifest, a table or a configuration
MOST_WEIGHTS = 64 * 2**30  # bytes of a file of weights or of an optimizer's state
DIGEST = "digest"  # of a manifest, in it
ATTEMPTS, PAUSE = 50, 0.001  # to read what is replaced meanwhile; seconds between them


@contextmanager
def open_regular(file: Path, most: int) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Raises:
        OSError: It can't be opened, is no regular file, or is longer than ``most`` bytes.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(file, flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"longer than {most:,} bytes", str(file))
        with open(descriptor, "rb", closefd=False) as stream:
            yield stream
    finally:
        os.close(descriptor)


def read_bytes(file: Path, most: int = MOST_TEXT) -> bytes:
    """Read a whole file; raises as ``open_regular``."""
    with open_regular(file, most) as stream:
        return stream.read()


def read_large(file: Path) -> bytes:
    """Read a whole file of weights (safetensors) or of optimizer state (zip).

    Raises:
        OSError: See ``open_regular`` and ``read_stream``.
    """
    with open_regular(file, MOST_WEIGHTS) as stream:
        return read_stream(stream, file)


def read_stream(stream: BinaryIO, file: Path) -> bytes:
    """Read all of an open file; raises as ``read_large``.

    Raises:
        OSError: A large file whose form is neither, as a sparse one's, or one that can't be read.
    """
    length = os.fstat(stream.fileno()).st_size
    if length > MOST_TEXT:  # a shorter one is soon read, and then judged
        head = int.from_bytes(stream.read(8), "little")  # of safetensors, in bytes
        if not 0 < head <= MOST_TEXT and not zipfile.is_zipfile(stream):
            raise OSError(errno.EINVAL, "damaged, neither safetensors nor a zip", str(file))
        stream.seek(0)
    return stream.read()


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: See ``open_regular``.
        ValueError: Not JSON, not UTF-8, nested too deeply, or with a number beyond all floats.
    """
    return parse_json(read_bytes(file))


def parse_json(data: bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: Not JSON, not UTF-8, nested too deeply, or with a number beyond all floats.
    """
    try:
        return json.loads(data, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _integer(text: str) -> int:
    """Parse an integer that a float can hold, as readers compare and convert numbers freely."""
    if len(text) > 308:  # the digits of the largest float, less one
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def settled(read: Callable[[], T], *manifests: Path) -> T:
    """Read files that belong together, again if another process replaced them meanwhile.

    Args:
        read: Reads them; its error counts if the manifests are what they were before it.
        manifests: Files that are replaced whenever the others are.

    Raises:
        SmallfryError: Any error of ``read``; also if the files are replaced again and again.
    """
    failure: SmallfryError | None = None
    is_settled = False
    for _ in range(ATTEMPTS):
        before = [_version(file) for file in manifests]
        try:
            return read()
        except SmallfryError as error:
            failure, is_settled = error, [_version(file) for file in manifests] == before
        if is_settled and before[0] is not None:
            raise failure
        if is_settled:  # it may be between two renames
            time.sleep(PAUSE)
    assert failure is not None
    if is_settled:
        raise failure
    folder = manifests[0].parent
    raise type(failure)(f"{folder}: is replaced again and again while it is read; try later")


def _version(file: Path) -> tuple[int, int, int, bytes] | None:
    """Read a file with its identity on disk.

    A different file may have the same content, a copied modification time and a reused inode;
    ``st_ctime`` can't be chosen by a user.
    """
    try:
        with open_regular(file, MOST_TEXT) as stream:
            found = os.fstat(stream.fileno())
            return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, stream.read()
    except OSError:
        return None


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add a digest to the content of a manifest, which ``has_valid_digest`` checks."""
    written = json.loads(json.dumps(dict(content)))  # in which all keys are text
    return {**written, DIGEST: _digest(written)}


def has_valid_digest(content: Mapping[str, Any]) -> bool:
    """Verify the digest of a manifest; format 1 has none and passes."""
    if DIGEST not in content:
        return content.get("format") == 1
    return bool(content[DIGEST] == _digest(content))


def _digest(content: Mapping[str, Any]) -> str:
    said = {key: value for key, value in content.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
