"""What every study's folder needs: one writer at a time, and an end that loses nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from smallfry.errors import RunError, Stopped
from smallfry.signals import Signalled, keeping, raising


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing; a killed process lets go of it.

    Raises:
        RunError: Another process writes, or the folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{folder}: another process runs this study") from None
    except OSError as error:
        raise RunError(f"{folder}: can't be used as a study's folder ({error})") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Turn a signal that asks for an end into ``Stopped`` with this message."""
    try:
        with keeping(lambda: message), raising():
            yield
    except Signalled as signalled:
        raise Stopped(signalled.signal_number, f"stopped; {message}") from None
