"""Ledger of a search: every trial as a JSON line, for resuming."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smallfry.errors import RunError
from smallfry.io.json import strict
from smallfry.io.json_lines import JsonLines
from smallfry.search.space import Candidate, Search, Trial, key_of

FIELDS = frozenset(Trial.__dataclass_fields__)


class Ledger:
    """File of trials, in the order of their ends.

    Args:
        file: A JSON-lines file.
    """

    def __init__(self, file: Path) -> None:
        self._lines = JsonLines(file, _trial, "a trial")

    @property
    def file(self) -> Path:
        """File of the trials."""
        return self._lines.file

    def read(self) -> list[Trial]:
        """Read all trials.

        Raises:
            RunError: A line is no trial.
        """
        return [_trial(record) for record in self._lines.read()]

    def append(self, trial: Trial) -> None:
        """Append a trial, flushed to disk; raises as ``JsonLines.append``."""
        self._lines.append(strict(trial.to_dict()))


def replay(search: Search, trials: Sequence[Trial]) -> None:
    """Bring a new search to where it was after these trials.

    Raises:
        RunError: The search would not have asked for one of them.
    """
    asked: list[Candidate] = []
    for trial in trials:
        while key_of(trial.candidate) not in map(key_of, asked):
            found = search.ask(1)
            if not found:
                raise RunError(
                    f"the logged trial of {dict(trial.candidate)} is none of this search: it was "
                    "made with other settings, or by another version"
                )
            asked += found
        asked = [each for each in asked if key_of(each) != key_of(trial.candidate)]
        search.tell([trial])


def run(search: Search, evaluate: Callable[[Candidate], Trial], ledger: Ledger) -> list[Trial]:
    """Evaluate the candidates of a search, one at a time, until it proposes no more.

    Args:
        search: A new one; the trials of the ledger are replayed to it first.
        evaluate: Evaluates a candidate; what it raises ends the search, which can be resumed.
        ledger: Receiver of the trials.

    Returns:
        All trials, those of the ledger too.
    """
    trials = ledger.read()
    replay(search, trials)
    while asked := search.ask(1):
        trial = evaluate(asked[0])
        ledger.append(trial)
        trial = _trial(strict(trial.to_dict()))  # as a resumed search reads it
        search.tell([trial])
        trials.append(trial)
    return trials


def best(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the greatest value, the first of equals; None without any."""
    valued = [trial for trial in trials if trial.value is not None]
    return max(valued, key=lambda trial: trial.value or 0.0, default=None)


def _trial(record: Any) -> Trial:
    if not isinstance(record, dict) or not {*record} <= FIELDS:
        raise TypeError("expected the fields of a trial")
    value = record.get("value")
    if value is not None and not (type(value) in (int, float) and abs(value) < math.inf):
        raise TypeError("expected a finite number or null as value")
    trial = Trial(**record)
    if not all(isinstance(each, dict) for each in (trial.candidate, trial.cost, trial.measured)):
        raise TypeError("expected a candidate, costs and figures by name")
    return trial
