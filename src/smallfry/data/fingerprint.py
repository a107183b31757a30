"""Fingerprints of files and of derived data."""

import errno
import hashlib
from pathlib import Path

from smallfry.errors import AccessError


def stamp(file: Path) -> str:
    """Return path, inode, size and times of a file: equal while its content is."""
    try:
        found = file.stat()
    except OSError as error:
        if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):  # it is there all the same
            raise AccessError(f"{file}: can't be read now ({error}); try again") from error
        return f"{file}\0missing"  # a broken link; reading it will report it
    times = f"{found.st_mtime_ns}\0{found.st_ctime_ns}"
    return f"{file.resolve()}\0{found.st_ino}\0{found.st_size}\0{times}"


def digest(*parts: str) -> str:
    """Hash texts to 32 characters, such as the name of a cached array."""
    # a path may be no UTF-8
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]
