"""What every study's folder needs: one writer at a time, and an end that loses nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from smallfry.errors import RunError, Stopped
from smallfry.io.replace import sweep
from smallfry.io.signals import Signalled, keeping, raising
from smallfry_runtime.stages import entries

STUDY, TRIALS = "study.json", "trials.jsonl"
MARKS = (STUDY, TRIALS)  # one of which is in the folder of a study that has begun


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing; a killed process lets go of it.

    Raises:
        RunError: Another process writes, or the folder can't be made or holds something else.
    """
    try:
        found = [name for name in entries(folder) if not name.startswith(".")]
        if found and not {*MARKS} & {*found}:
            raise RunError(f"{folder}: holds {found[0]}, and is no study; take another --folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        for place in (folder, folder / "pictures"):
            sweep(place)
    except Timeout:
        raise RunError(f"{folder}: another process runs this study") from None
    except OSError as error:
        raise RunError(f"{folder}: can't be used as a study's folder ({error})") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def reporting(folder: Path) -> Iterator[None]:
    """Say of a report that can't be written what it is.

    Raises:
        RunError: The disk is full, or the like.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: the report could not be written ({error})") from error


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Turn a signal that asks for an end into ``Stopped`` with this message."""
    try:
        with keeping(lambda: message), raising():
            yield
    except Signalled as signalled:
        raise Stopped(signalled.signal_number, f"stopped; {message}") from None
