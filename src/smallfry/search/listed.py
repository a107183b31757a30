"""Exhaustive search: given candidates in their order, each once."""

from collections.abc import Sequence
from typing import Any

from smallfry.errors import UsageError
from smallfry.search.space import Candidate, Trial, require_count, require_trials


class Listed:
    """Search over given candidates.

    Args:
        candidates: In the order in which they are asked for.

    Raises:
        UsageError: There are none.

    Example:
        >>> search = Listed([{"depth": 2}, {"depth": 4}])
        >>> search.ask(8), search.ask(1)
        ([{'depth': 2}, {'depth': 4}], [])
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        if not candidates:
            raise UsageError("a search needs at least one candidate")
        self._candidates = [dict(each) for each in candidates]
        self._asked = self._told = 0

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return the next candidates."""
        found = self._candidates[self._asked : self._asked + require_count(count)]
        self._asked += len(found)
        return [dict(each) for each in found]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Count trials; they decide nothing."""
        self._told += len(require_trials(trials))

    def state_dict(self) -> dict[str, Any]:
        """Return the candidates, and how many were asked for and told."""
        return {"candidates": self._candidates, "asked": self._asked, "told": self._told}
