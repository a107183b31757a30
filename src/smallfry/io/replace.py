"""Atomic replacement of files and folders, safe against kills at any time.

New content is written beside its place, under a name that begins with ``.smallfry-`` and ends at
random, and is brought to the disk before it is renamed. A folder takes the place of another by an
exchange of names where the system has one (Linux), else by two renames.

The new content of a folder stands in a *stage*::

    .smallfry-NAME-…/lock    held while the process lives
                     new/    what is being written; after it took its place, what it replaced
                     old/    what is being replaced
                     moved/  the same, inside a folder that can't be renamed

so the next process that writes to the same place sees what a killed one left, and undoes it.
"""

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout

from smallfry_runtime.stages import (
    MARK,
    MOVED,
    OF_VOLUMES,
    OLD,
    entries,
    prefix_of,
    resolved,
    stages_of,
)

LOCK, NEW, OLDER = "lock", "new", "older"
LAST = "manifest.json"  # of a folder, which is not whole before it is there
EXCHANGE = 2  # RENAME_EXCHANGE of Linux
UNMOVABLE = (errno.EBUSY, errno.EXDEV)  # a mounted folder, and one of an image's lower layer
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of systems that can't sync a folder


def write_whole(file: Path, data: bytes) -> None:
    """Write a file atomically, replacing a link rather than its target.

    Raises:
        OSError: It could not be written; what was there is untouched.
    """
    part = file.parent / f"{prefix_of(file)}{secrets.token_hex(4)}"
    try:
        with open(part, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync(file.parent)


@contextmanager
def replacing(
    folder: Path, check: Callable[[], None] = lambda: None, previous: Path | None = None
) -> Iterator[Path]:
    """Yield a new folder that replaces ``folder`` when the block ends.

    A link is followed. A folder that can't be renamed keeps its place and gets the new entries:
    one that is mounted, that the process works in, or whose parent is not writable.

    Args:
        folder: The place; its parents are made.
        check: Raises if something else stands in the place; before the work, and again after it.
        previous: Path for the replaced folder, replacing an earlier one; default none.

    Raises:
        OSError: It can't be written there, which is found before the block begins if it can be; the
            folder is as it was.
    """
    folder = resolved(folder)
    recover(folder)
    check()
    folder.parent.mkdir(parents=True, exist_ok=True)
    inside = previous is None and folder.is_dir() and not _is_movable(folder)
    with _stage(folder, inside) as stage:
        new = stage / NEW
        new.mkdir()
        yield new
        sync_tree(new)
        check()
        if inside:
            _move_in(stage, folder)
        else:
            _take_place(stage, folder, previous)


def recover(folder: Path) -> None:
    """Undo an interrupted replacement by a killed process; a running one is left alone.

    Raises:
        OSError: The original content can't be restored.
    """
    folder = resolved(folder)
    for stage in stages_of(folder):
        with _claimed(stage) as is_ours:
            if is_ours:
                _undo(stage, folder)
                shutil.rmtree(stage, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove leftovers of killed processes in a folder that the caller has locked."""
    for entry in folder.glob(f"{MARK}*"):
        if entry.is_dir() and not entry.is_symlink():
            with _claimed(entry) as is_ours:
                if is_ours and not (entry / OLD).exists():  # which ``recover`` puts back
                    shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Flush a folder and all its contents to disk."""
    for place, _, names in os.walk(folder):
        for path in (*(Path(place) / name for name in names), Path(place)):
            if not path.is_symlink():
                sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk.

    Raises:
        OSError: The disk has failed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder, on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise
    finally:
        os.close(descriptor)


# Stages


@contextmanager
def _stage(folder: Path, inside: bool) -> Iterator[Path]:
    """Yield a stage of our own, removed at the end, with the folder left intact."""
    place = folder if inside else folder.parent
    while True:
        stage = Path(mkdtemp(prefix=prefix_of(folder), dir=place))
        lock = _lock(stage)
        if lock is not None:
            break
    try:
        yield stage
    finally:
        try:
            _undo(stage, folder)
        finally:
            lock.release()
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _claimed(stage: Path) -> Iterator[bool]:
    """Try to claim a stage whose process has ended, and yield whether that worked."""
    lock = _lock(stage)
    try:
        yield lock is not None and lock.is_locked
    finally:
        if lock is not None:
            lock.release()


def _lock(stage: Path) -> FileLock | None:
    """Lock a stage; None if another process holds the lock. No-op without file locks."""
    lock = FileLock(stage / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):
        return None
    except (OSError, NotImplementedError):  # a network's file system
        return lock
    if not stage.exists():
        lock.release()
        return None
    return lock


def _undo(stage: Path, folder: Path) -> None:
    """Restore a folder left between two steps; afterwards its stage can be removed."""
    old = stage / OLD
    if stage.parent != folder:
        if old.exists() and not folder.exists():
            old.rename(folder)
    elif old.exists():
        _move(old, folder)
    elif (stage / MOVED).exists():
        _move(stage / NEW, folder)


# Taking a place


def _is_movable(folder: Path) -> bool:
    here = Path.cwd()
    return not (
        os.path.ismount(folder)
        or here == folder
        or folder in here.parents
        or not os.access(folder.parent, os.W_OK)
        or (folder / OF_VOLUMES).exists()
    )


def _take_place(stage: Path, folder: Path, previous: Path | None) -> None:
    new, old = stage / NEW, stage / OLD
    if not folder.exists():
        new.rename(folder)
    else:
        with suppress(OSError):  # of a file system without permissions
            shutil.copymode(folder, new)
        try:
            if previous is None:
                _exchange(new, folder, old)
            else:
                _keep(stage, folder, previous)
        except OSError as error:
            if error.errno not in UNMOVABLE or previous is not None:
                raise
            with _stage(folder, inside=True) as other:
                shutil.copytree(new, other / NEW)
                sync_tree(other / NEW)
                _move_in(other, folder)
            return
    sync(folder.parent)


def _exchange(new: Path, folder: Path, old: Path) -> None:
    """Swap two folders, through ``old`` where that takes two renames."""
    if not _swap(new, folder):
        folder.rename(old)
        new.rename(folder)
        old.rename(new)


def _keep(stage: Path, folder: Path, previous: Path) -> None:
    """Put the new folder in its place, and the previous one in that of its predecessor."""
    new = stage / NEW
    if _swap(new, folder):
        if not (previous.exists() and _swap(new, previous)):
            new.rename(previous)
        return
    if previous.exists():
        previous.rename(stage / OLDER)
    folder.rename(previous)
    new.rename(folder)


def _move_in(stage: Path, folder: Path) -> None:
    """Replace the entries of a folder; readers see it without the last one meanwhile."""
    new, old = stage / NEW, stage / OLD
    old.mkdir()
    for name in sorted(entries(folder), key=lambda name: name != LAST):
        (folder / name).rename(old / name)
    sync(folder)
    old.rename(stage / MOVED)  # from here on, a killed process has what is new taken in
    _move(new, folder)
    sync(folder)


def _move(source: Path, folder: Path) -> None:
    for name in sorted(os.listdir(source), key=lambda name: name == LAST):
        (source / name).rename(folder / name)


def _swap(one: Path, other: Path) -> bool:
    """Swap two paths atomically; False where the system can't."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    sys.audit("os.rename", str(one), str(other), -1, -1)  # as os.rename does
    here = ctypes.c_int(-100)  # AT_FDCWD
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(here, names[0], here, names[1], ctypes.c_uint(EXCHANGE)) == 0)


@cache
def _renameat2() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "renameat2", None)
