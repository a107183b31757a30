"""Regularised evolution (Real, Aggarwal, Huang, Le, AAAI 2019, arXiv 1802.01548).

parents    the newest ``population`` trials, so that the oldest one dies at each birth
child      the best of ``tournament`` random parents, with one choice changed
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from smallfry.errors import UsageError
from smallfry.search.proposals import Proposals
from smallfry.search.sampling import Allowed, mutate, new_candidate, sample
from smallfry.search.space import Choice, Trial

__all__ = ["Evolution"]


class Evolution:
    """Search by regularised evolution; no candidate is asked for twice.

    Args:
        choices: Choices of the space, each after those in its condition.
        count: Candidates to ask for.
        seed: Random seed.
        allowed: Whether a candidate may be proposed; default every one.
        population: Random candidates at first, and the number of parents.
        tournament: Parents of which the best is changed.

    Raises:
        UsageError: No candidates, no choices, or a tournament larger than the population.

    Example:
        >>> search = Evolution([Choice("depth", (2, 4, 6))], count=3, population=2, tournament=1)
        >>> search.tell([Trial(each, value=each["depth"]) for each in search.ask(3)])
        >>> search.ask(1)
        []
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        count: int,
        seed: int = 0,
        allowed: Allowed = lambda candidate: True,
        population: int = 20,
        tournament: int = 5,
    ) -> None:
        if not 1 <= tournament <= population:
            raise UsageError(
                f"a tournament has 1 to {population} of the population, not {tournament}"
            )
        self._proposals = Proposals("evolution", choices, count, seed)
        self._choices, self._allowed = tuple(choices), allowed
        self._population, self._tournament = population, tournament

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return random candidates at first, then children."""
        return self._proposals.ask(count, lambda: self._new(self._proposals.generator()))

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take trials, which become the youngest parents."""
        self._proposals.tell(trials)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the number of proposals, and the trials."""
        return {
            **self._proposals.state_dict(),
            "population": self._population,
            "tournament": self._tournament,
        }

    def _new(self, generator: np.random.Generator) -> dict[str, Any] | None:
        parents = deque(self._proposals.valued, maxlen=self._population)

        def child() -> dict[str, Any]:
            if self._proposals.asked < self._population or not parents:
                return sample(self._choices, generator)
            rows = generator.permutation(len(parents))[: self._tournament]
            best = max((parents[int(row)] for row in rows), key=lambda trial: trial.value or 0.0)
            return mutate(self._choices, best.candidate, generator)

        found = new_candidate(child, self._proposals.is_known, self._allowed)
        if found is not None:
            return found
        return new_candidate(  # the parents' neighbours are all known
            lambda: sample(self._choices, generator), self._proposals.is_known, self._allowed
        )
