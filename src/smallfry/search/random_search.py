"""Random search (Bergstra and Bengio, JMLR 2012): the baseline of every other strategy."""

from collections.abc import Sequence
from typing import Any

from smallfry.search.proposals import Proposals
from smallfry.search.sampling import Allowed, new_candidate, sample
from smallfry.search.space import Choice, Trial

__all__ = ["RandomSearch"]


class RandomSearch:
    """Search by independent random candidates, none twice.

    Args:
        choices: Choices of the space, each after those in its condition.
        count: Candidates to ask for.
        seed: Random seed.
        allowed: Whether a candidate may be proposed; default every one.

    Raises:
        UsageError: No candidates, or no choices.

    Example:
        >>> search = RandomSearch([Choice("depth", (2, 4))], count=5)
        >>> sorted(each["depth"] for each in search.ask(5))
        [2, 4]
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        count: int,
        seed: int = 0,
        allowed: Allowed = lambda candidate: True,
    ) -> None:
        self._proposals = Proposals("random search", choices, count, seed)
        self._choices, self._allowed = tuple(choices), allowed

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return random candidates."""
        return self._proposals.ask(count, self._new)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take trials; they decide nothing."""
        self._proposals.tell(trials)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the number of proposals, and the trials."""
        return self._proposals.state_dict()

    def _new(self) -> dict[str, Any] | None:
        generator = self._proposals.generator()
        return new_candidate(
            lambda: sample(self._choices, generator), self._proposals.is_known, self._allowed
        )
