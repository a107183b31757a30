"""Study folders: a lock for one writer, and a clean stop."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from smallfry.errors import RunError, Stopped
from smallfry.io.replace import sweep
from smallfry.io.signals import Signalled, keeping, raising
from smallfry_runtime.stages import entries

STUDY, TRIALS = "study.json", "trials.jsonl"
MARKS = (STUDY, TRIALS)  # one of which is in the folder of a study that has begun


@contextmanager
def locked(
    folder: Path, marks: Collection[str] = MARKS, kind: str = "study", option: str = "--folder"
) -> Iterator[None]:
    """Lock the folder for writing; the lock of a killed process is released.

    Args:
        folder: The folder, which is made if it is not there.
        marks: Files of which one is in every folder that is not empty.
        kind: Name of what writes, for errors.
        option: The option that names the folder.

    Raises:
        RunError: Another process writes, or the folder can't be made or holds something else.
    """
    try:
        found = [name for name in entries(folder) if not name.startswith(".")]
        if found and not {*marks} & {*found}:
            article = "an" if kind[0] in "aeiou" else "a"
            raise RunError(
                f"{folder}: not {article} {kind} folder, it holds {found[0]}; use another {option}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        for place in (folder, folder / "pictures"):
            sweep(place)
    except Timeout:
        raise RunError(f"{folder}: another process runs this {kind}") from None
    except OSError as error:
        raise RunError(f"{folder}: can't be used as a {kind} folder ({error})") from error
    try:
        yield
    finally:
        lock.release()


def read_measured(file: Path) -> dict[str, Any]:
    """Read a file of measurements; nothing if it is missing or damaged, so that it is made again.

    Args:
        file: A JSON file of the folder.
    """
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


@contextmanager
def reporting(folder: Path) -> Iterator[None]:
    """Add the context of a report to an error in writing it.

    Raises:
        RunError: The disk is full, or the like.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: the report could not be written ({error})") from error


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Convert a stop signal to ``Stopped`` with this message."""
    try:
        with keeping(lambda: message), raising():
            yield
    except Signalled as signalled:
        raise Stopped(signalled.signal_number, f"stopped; {message}") from None
