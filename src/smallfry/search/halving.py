"""Successive halving: all candidates are trained briefly, and the best of each rung further.

    rung 0      every candidate that another search proposes
    rung r      the keep[r − 1] best of rung r − 1

Jamieson and Talwalkar, AISTATS 2016 (arXiv 1502.07943). What a rung costs is up to the evaluation:
candidates have the rung's number as ``rung``.
"""

from collections.abc import Sequence
from typing import Any

from smallfry.errors import UsageError
from smallfry.search.space import (
    RUNG,
    Candidate,
    Search,
    Trial,
    key_of,
    require_count,
    require_trials,
)


class Halving:
    """Successive halving over the candidates of another search.

    Args:
        first: Search whose candidates are the first rung; it is told their trials.
        keep: Candidates of each later rung, no more than of the one before.

    Raises:
        UsageError: A rung of no candidates, or of more than the one before.

    Example:
        >>> from smallfry.search import Listed, Trial
        >>> search = Halving(Listed([{"depth": 2}, {"depth": 4}]), keep=[1])
        >>> first = search.ask(2)
        >>> search.tell([Trial(each, value=each["depth"]) for each in first])
        >>> search.ask(2)
        [{'depth': 4, 'rung': 1}]
    """

    def __init__(self, first: Search, keep: Sequence[int]) -> None:
        if any(count < 1 for count in keep) or list(keep) != sorted(keep, reverse=True):
            raise UsageError(f"keep has falling numbers of at least 1, not {list(keep)}")
        self._first, self._keep = first, tuple(keep)
        self._rung = 0
        self._waiting: list[dict[str, Any]] = []  # of this rung, to be asked for
        self._awaited: list[dict[str, Any]] = []  # asked for, and not told
        self._trials: list[Trial] = []

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return candidates of this rung; of the next one when all of this are told."""
        count = require_count(count)
        if self._rung == 0:
            found = [{**each, RUNG: 0} for each in self._first.ask(count)]
            self._awaited += found
            if found or self._awaited or count == 0:
                return found
        if not self._waiting and not self._awaited:
            self._promote()
        found, self._waiting = self._waiting[:count], self._waiting[count:]
        self._awaited += found
        return [dict(each) for each in found]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take trials; those of the first rung go to the first search, without the rung."""
        for trial in require_trials(trials):
            known = {key_of(each) for each in self._awaited}
            if key_of(trial.candidate) not in known:
                raise UsageError(f"{dict(trial.candidate)} was not asked for")
            self._awaited = [e for e in self._awaited if key_of(e) != key_of(trial.candidate)]
            self._trials.append(trial)
            if trial.candidate[RUNG] == 0:
                fields = trial.to_dict() | {"candidate": _without_rung(trial.candidate)}
                self._first.tell([Trial(**fields)])

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the rung, and what is awaited and told."""
        return {
            "first": self._first.state_dict(),
            "keep": list(self._keep),
            "rung": self._rung,
            "awaited": self._awaited,
            "told": [trial.to_dict() for trial in self._trials],
        }

    def _promote(self) -> None:
        """Begin the next rung, if there is one."""
        if self._rung == len(self._keep):
            return
        best = survivors(self._trials, self._rung, self._keep[self._rung])
        self._rung += 1
        self._waiting = [{**_without_rung(trial.candidate), RUNG: self._rung} for trial in best]


def survivors(trials: Sequence[Trial], rung: int, count: int) -> list[Trial]:
    """Return the best trials of a rung, best first, of equals the one that was told first."""
    valued = [t for t in trials if t.candidate[RUNG] == rung and t.value is not None]
    return sorted(valued, key=lambda trial: -(trial.value or 0.0))[:count]


def _without_rung(candidate: Candidate) -> dict[str, Any]:
    return {name: value for name, value in candidate.items() if name != RUNG}
