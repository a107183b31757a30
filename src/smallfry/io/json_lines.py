"""JSON lines: a file of records, with one writer and any number of readers."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smallfry.errors import RunError
from smallfry.io.replace import sync


class JsonLines:
    """File of records, to which a killed writer leaves whole lines.

    Args:
        file: The file; created by the first record.
        check: Raises ValueError, KeyError or TypeError on what is no record.
        kind: Name of a record, for errors.
    """

    def __init__(
        self, file: Path, check: Callable[[Any], object] = dict, kind: str = "a record"
    ) -> None:
        self.file, self.check, self.kind = file, check, kind

    def read(self) -> list[dict[str, Any]]:
        """Read all records in their order.

        A last line without its end is what a killed writer left: it is not taken.

        Raises:
            RunError: A line is no record.
        """
        if not self.file.exists():
            return []
        records = []
        for number, line in enumerate(self.file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                self.check(record)
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{self.file}, line {number}: not {self.kind} ({error!r}); fix or remove the "
                    "line"
                ) from None
            records.append(record)
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record, flushed to disk.

        Raises:
            RunError: It could not be written; what stood there stands.
        """
        line = json.dumps(record, allow_nan=False) + "\n"
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
                        sync(self.file.parent)
                except OSError:
                    os.truncate(self.file, whole)
                    raise
        except OSError as error:
            raise RunError(f"{self.file}: could not be written ({error})") from error


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
