"""Random candidates, their mutation and their crossover; choices come after their conditions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smallfry.search.space import Candidate, Choice

__all__ = [
    "Allowed",
    "all_candidates",
    "crossover",
    "draw",
    "from_units",
    "is_ordered",
    "mutate",
    "new_candidate",
    "sample",
]

Allowed = Callable[[Candidate], bool]  # whether a candidate may be proposed
REPEATS = 2000  # proposals in a row that are known or not allowed, after which none seems left


def sample(choices: Sequence[Choice], generator: np.random.Generator) -> dict[str, Any]:
    """Draw a candidate: uniform values, in ranges by their scale."""
    return _filled(choices, {}, generator)


def mutate(
    choices: Sequence[Choice],
    candidate: Candidate,
    generator: np.random.Generator,
    rate: float | None = None,
) -> dict[str, Any]:
    """Change choices of a candidate.

    Args:
        choices: The space's.
        candidate: Stays as it is.
        generator: Random numbers.
        rate: Probability of a change in each choice; default changes exactly one.

    Returns:
        The child; choices that exist by the change are drawn.
    """
    active = [choice for choice in choices if choice.name in candidate]
    if rate is None:
        changed = {int(generator.integers(len(active)))}
    else:
        changed = {*np.flatnonzero(generator.random(len(active)) < rate).tolist()}
    child = dict(candidate)
    for position in sorted(changed):
        choice = active[position]
        child[choice.name] = _other(choice, candidate[choice.name], generator)
    return _filled(choices, child, generator)


def crossover(
    choices: Sequence[Choice], one: Candidate, other: Candidate, generator: np.random.Generator
) -> dict[str, Any]:
    """Take each choice of one of two parents with equal probability."""
    taken = dict(other)
    for choice in choices:
        if generator.random() < 0.5 and choice.name in one:
            taken[choice.name] = one[choice.name]
    return _filled(choices, taken, generator)


def new_candidate(
    propose: Callable[[], dict[str, Any]], known: Callable[[Candidate], bool], allowed: Allowed
) -> dict[str, Any] | None:
    """Propose until a candidate is allowed and new; None if there seems to be none left."""
    for _ in range(REPEATS):
        candidate = propose()
        if not known(candidate) and allowed(candidate):
            return candidate
    return None


def all_candidates(choices: Sequence[Choice], most: int) -> list[dict[str, Any]] | None:
    """List all candidates of a space; None if it has ranges of reals, or more than ``most``.

    Example:
        >>> all_candidates([Choice("a", (1, 2)), Choice("b", (3, 4), when={"a": [2]})], most=9)
        [{'a': 1}, {'a': 2, 'b': 3}, {'a': 2, 'b': 4}]
    """
    found: list[dict[str, Any]] = [{}]
    for choice in choices:
        values = _values(choice)
        if values is None:
            return None
        if sum(len(values) if choice.is_active(each) else 1 for each in found) > most:
            return None
        found = [
            {**each, **option}
            for each in found
            for option in (
                [{choice.name: value} for value in values] if choice.is_active(each) else [{}]
            )
        ]
    return found


def draw(choice: Choice, unit: float) -> Any:
    """Map a number from 0 to below 1 to a value of a choice."""
    if choice.values:
        return choice.values[int(unit * len(choice.values))]
    assert choice.low is not None
    assert choice.high is not None
    low, high = choice.low, choice.high + choice.whole
    value = float(low * (high / low) ** unit if choice.log else low + unit * (high - low))
    return int(min(math.floor(value), choice.high)) if choice.whole else min(value, high)


def from_units(choices: Sequence[Choice], units: Sequence[float]) -> dict[str, Any]:
    """Map numbers from 0 to below 1, one for each choice, to a candidate."""
    found: dict[str, Any] = {}
    for choice, unit in zip(choices, units, strict=True):
        if choice.is_active(found):
            found[choice.name] = draw(choice, unit)
    return found


def _filled(
    choices: Sequence[Choice], values: Candidate, generator: np.random.Generator
) -> dict[str, Any]:
    """Draw the active choices that have no value, and leave out the inactive ones."""
    found: dict[str, Any] = {}
    for choice in choices:
        if choice.is_active(found):
            known = choice.name in values
            found[choice.name] = values[choice.name] if known else draw(choice, generator.random())
    return found


def _other(choice: Choice, value: Any, generator: np.random.Generator) -> Any:
    """Draw another value; of an ordered choice its neighbour in half of the cases."""
    values = _values(choice)
    if values is None:
        return draw(choice, generator.random())
    position = values.index(value)
    if len(values) > 2 and is_ordered(choice) and generator.random() < 0.5:
        near = [n for n in (position - 1, position + 1) if 0 <= n < len(values)]
        return values[near[int(generator.integers(len(near)))]]
    if len(values) == 1:
        return value
    other = int(generator.integers(len(values) - 1))
    return values[other + (other >= position)]


def is_ordered(choice: Choice) -> bool:
    """Return whether a choice's values are numbers in their order."""
    numbers = all(type(value) in (int, float) for value in choice.values)
    return numbers and list(choice.values) == sorted(choice.values)


def _values(choice: Choice) -> Sequence[Any] | None:
    """Return the values of a choice, or None for a range of reals."""
    if choice.values:
        return choice.values
    if not choice.whole:
        return None
    assert choice.low is not None
    assert choice.high is not None
    return range(int(choice.low), int(choice.high) + 1)
