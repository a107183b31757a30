"""Log of finished trials: JSON lines, one writer, any number of readers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallfry.errors import RunError
from smallfry.io.replace import sync
from smallfry.studies.folder import TRIALS


class TrialLog:
    """File ``trials.jsonl`` in a study's folder.

    Args:
        folder: Folder of the study; created when first locked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / TRIALS

    def read(self) -> list[dict[str, Any]]:
        """Read all trials, in the order in which they ended.

        A last line without its end is what a killed writer left: it is not taken.

        Raises:
            RunError: A line is no trial.
        """
        if not self.file.exists():
            return []
        records = []
        for number, line in enumerate(self.file.read_text("utf-8").splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                record["phase"], record["problem"], record["contestant"], record["measured"]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{self.file}, line {number}: not a trial ({error!r}); fix or remove the line"
                ) from None
            records.append(record)
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a trial, flushed to disk.

        Raises:
            RunError: It could not be written; what stood there stands.
        """
        line = json.dumps(rounded(record), allow_nan=False) + "\n"
        try:
            with open(self.file, "a+b") as stream:
                size = stream.seek(0, os.SEEK_END)
                whole = _end_of_last_line(stream, size)
                if whole < size:
                    stream.truncate(whole)
                try:
                    stream.write(line.encode())
                    stream.flush()
                    os.fsync(stream.fileno())
                    if size == 0:  # the file is new
                        sync(self.folder)
                except OSError:
                    os.truncate(self.file, whole)
                    raise
        except OSError as error:
            raise RunError(f"{self.file}: could not be written ({error})") from error


def rounded(value: Any) -> Any:
    """Round numbers to six significant digits, with null for non-finite ones."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _end_of_last_line(stream: Any, size: int) -> int:
    """Find the end of the last complete line."""
    end = size
    while end > 0:
        start = max(0, end - 65536)
        stream.seek(start)
        found: int = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
