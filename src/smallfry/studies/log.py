"""Log of finished trials: JSON lines, one writer, any number of readers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallfry.io.json_lines import JsonLines
from smallfry.studies.folder import TRIALS


class TrialLog:
    """File ``trials.jsonl`` in a study's folder.

    Args:
        folder: Folder of the study; created when first locked.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / TRIALS
        self._lines = JsonLines(self.file, _require_trial, "a trial")

    def read(self) -> list[dict[str, Any]]:
        """Read all trials, in the order in which they ended; raises as ``JsonLines.read``."""
        return self._lines.read()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a trial; raises as ``JsonLines.append``."""
        self._lines.append(rounded(record))


def _require_trial(record: Any) -> None:
    record["phase"], record["problem"], record["contestant"], record["measured"]


def rounded(value: Any) -> Any:
    """Round numbers to six significant digits, with null for non-finite ones."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
