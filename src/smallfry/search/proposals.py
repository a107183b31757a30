"""Candidates that a strategy has asked for, and their trials."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smallfry.errors import UsageError
from smallfry.search.space import Candidate, Trial, key_of, require_count, require_trials

__all__ = ["Proposals"]


class Proposals:
    """Memory of a strategy: at most so many candidates, each once.

    Args:
        strategy: Its name, for errors.
        choices: Choices of the space.
        count: Candidates to ask for.
        seed: Seed of the strategy.

    Raises:
        UsageError: No candidates, or no choices.
    """

    def __init__(self, strategy: str, choices: Sequence[Any], count: int, seed: int) -> None:
        if count < 1 or not choices:
            raise UsageError(f"{strategy} needs choices, and at least one candidate, not {count}")
        self.count, self.seed = count, seed
        self.trials: list[Trial] = []
        self._asked: set[Any] = set()
        self._awaited: set[Any] = set()

    @property
    def asked(self) -> int:
        """Number of candidates that were asked for."""
        return len(self._asked)

    @property
    def left(self) -> int:
        """Number of candidates that may still be asked for."""
        return self.count - self.asked

    @property
    def is_waiting(self) -> bool:
        """True while a trial is awaited."""
        return bool(self._awaited)

    @property
    def valued(self) -> list[Trial]:
        """Trials that did not fail."""
        return [trial for trial in self.trials if trial.value is not None]

    def generator(self) -> np.random.Generator:
        """Return random numbers for the next candidate, whatever was drawn for those before."""
        return np.random.default_rng([self.seed, self.asked])

    def is_known(self, candidate: Candidate) -> bool:
        """Return whether a candidate was asked for."""
        return key_of(candidate) in self._asked

    def add(self, candidate: Candidate) -> None:
        """Note a candidate that is asked for."""
        self._asked.add(key_of(candidate))
        self._awaited.add(key_of(candidate))

    def ask(self, count: int, new: Callable[[], dict[str, Any] | None]) -> list[dict[str, Any]]:
        """Return new candidates, at most ``count`` and as many as are left.

        Args:
            count: Candidates wanted.
            new: Proposes one; None where nothing new is left, after which none is asked for.
        """
        found: list[dict[str, Any]] = []
        count = require_count(count)
        while len(found) < count and self.left:
            candidate = new()
            if candidate is None:
                self.end()
                break
            self.add(candidate)
            found.append(candidate)
        return found

    def hand_out(self, planned: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """Take the first candidates off a plan, and note that they are asked for."""
        found = planned[: require_count(count)]
        del planned[: len(found)]
        for each in found:
            self.add(each)
        return [dict(each) for each in found]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take trials of candidates that were asked for.

        Raises:
            UsageError: One was not.
        """
        for trial in require_trials(trials):
            if key_of(trial.candidate) not in self._awaited:
                raise UsageError(f"{dict(trial.candidate)} was not asked for")
            self._awaited.remove(key_of(trial.candidate))
            self.trials.append(trial)

    def end(self) -> None:
        """Ask for no more."""
        self.count = self.asked

    def state_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "count": self.count,
            "seed": self.seed,
            "asked": self.asked,
            "told": [trial.to_dict() for trial in self.trials],
        }
