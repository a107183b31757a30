"""Search spaces and strategies: candidates that are asked for, and trials that are told.

space      the choices, and for each candidate its model and its training
candidate  a value for each choice: plain data, so that it can be logged and compared
trial      a candidate with its value, the greater the better, and its cost
search     ask(n) → candidates, tell(trials); a function of its settings and of the trials
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError
from smallfry.io.json import Plain, strict
from smallfry.settings import fitted
from smallfry.training.config import TrainConfig
from smallfry.transforms.spec import ModelSpec

Candidate = Mapping[str, Any]  # plain values by the names of choices

RUNG = "rung"  # entry of candidates that are trained in several rungs, from 0


@dataclass(frozen=True)
class Choice:
    """One choice of a space: some values, or a range.

    Args:
        name: Its name in candidates.
        values: The values, or none for a range.
        low: Lower end of a range.
        high: Upper end of a range, included.
        log: Spread the range over its logarithm.
        whole: Whole numbers only.
        when: Condition: for other choices' names, values with which this one exists.

    Example:
        >>> choices = [Choice("depth", (2, 4)), Choice("lr", low=0.01, high=1.0, log=True)]
        >>> encode(choices, {"depth": 4, "lr": 0.1}).tolist()
        [0.0, 1.0, 0.5]
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            values = json.loads(json.dumps(self.values, allow_nan=False))  # as a ledger has them
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"choice {self.name}: values are finite numbers, text, true, false, null, or lists "
                f"and mappings of these ({error})"
            ) from None
        object.__setattr__(self, "values", tuple(values))
        if bool(self.values) == (self.low is not None) or (self.low is None) != (self.high is None):
            raise UsageError(f"choice {self.name}: give values, or low and high")
        if any(value in self.values[:place] for place, value in enumerate(self.values)):
            raise UsageError(f"choice {self.name}: each value once, not {list(self.values)}")
        if not isinstance(self.when, Mapping) or not all(
            isinstance(values, list | tuple) for values in self.when.values()
        ):
            raise UsageError(
                f"choice {self.name}: when has lists of values by the names of other choices, not "
                f"{self.when!r}"
            )
        if type(self.log) is not bool or type(self.whole) is not bool:
            raise UsageError(f"choice {self.name}: log and whole are true or false")
        if self.low is not None and self.high is not None:
            self._require_range(self.low, self.high)

    def _require_range(self, low: float, high: float) -> None:
        if not all(type(end) in (int, float) and abs(end) < math.inf for end in (low, high)):
            raise UsageError(
                f"choice {self.name}: low and high are finite numbers, not {low!r} and {high!r}"
            )
        if not low < high:
            raise UsageError(f"choice {self.name}: low {low} is not below {high}")
        if self.log and low <= 0:
            raise UsageError(f"choice {self.name}: a logarithmic range is above 0")
        if self.whole and (low % 1 or high % 1):
            raise UsageError(
                f"choice {self.name}: the ends of whole numbers are whole, not {low} and {high}"
            )

    def is_active(self, candidate: Candidate) -> bool:
        """Return whether a candidate with these other values has this choice."""
        return all(candidate.get(name) in values for name, values in self.when.items())

    def encode(self, value: Any) -> list[float]:
        """Encode a value: one of several as zeros and a one, of a range from 0 to 1."""
        if self.values:
            return [float(value == each) for each in self.values]
        assert self.low is not None
        assert self.high is not None
        low, high, given = self.low, self.high, float(value)
        if self.log:
            low, high, given = math.log(low), math.log(high), math.log(given)
        return [(given - low) / (high - low)]

    @property
    def width(self) -> int:
        """Numbers in the encoding."""
        return len(self.values) or 1


def encode(choices: Sequence[Choice], candidate: Candidate) -> NDArray[np.float32]:
    """Encode a candidate for a predictor; choices that it does not have are zeros.

    Example:
        >>> encode([Choice("depth", (2, 4)), Choice("width", (8, 16))], {"depth": 2}).tolist()
        [1.0, 0.0, 0.0, 0.0]
    """
    parts = [
        choice.encode(candidate[choice.name]) if choice.name in candidate else [0.0] * choice.width
        for choice in choices
    ]
    return np.array([number for part in parts for number in part], np.float32)


class Space(Protocol):
    """Search space: choices, and the model and training of each candidate."""

    choices: tuple[Choice, ...]

    def spec(self, candidate: Candidate) -> ModelSpec:
        """Return the model of a candidate, with the data's classes and size."""

    def train(self, candidate: Candidate) -> TrainConfig:
        """Return the training of a candidate."""

    def encode(self, candidate: Candidate) -> NDArray[np.float32]:
        """Encode a candidate for a predictor, (numbers,)."""


@dataclass(frozen=True)
class Trial:
    """Evaluated candidate.

    Args:
        candidate: As it was asked for.
        value: The greater the better; None if it failed.
        seed: Random seed of the evaluation.
        cost: What it costs in use, such as ``{"kb": 80.0, "ms": 0.3}``.
        seconds: Duration of the evaluation.
        measured: Further figures.
        failure: Reason, if it failed.

    A value that is not finite, as of a training that diverged, is None: the trial has failed.

    Example:
        >>> Trial({"depth": 2}, value=0.9, cost={"kb": 80.0}).cost["kb"]
        80.0
    """

    candidate: Candidate
    value: float | None
    seed: int = 0
    cost: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    measured: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def __post_init__(self) -> None:
        value = fitted(self.value, float | None, "value")
        if value is not None and not math.isfinite(value):
            object.__setattr__(self, "value", None)
            object.__setattr__(self, "failure", self.failure or f"its value is {value}")

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data."""
        return asdict(self)


def require_trials(trials: Any) -> Sequence[Trial]:
    """Require a list of trials, as a strategy is told."""
    if isinstance(trials, list | tuple) and all(isinstance(each, Trial) for each in trials):
        return trials
    raise UsageError(f"tell takes a list of Trial(candidate, value=…), not {trials!r}")


def require_count(count: Any) -> int:
    """Require a number of candidates, as a strategy is asked for."""
    number: int = fitted(count, int, "count")
    if number < 0:
        raise UsageError(f"count of candidates can't be negative, got {number}")
    return number


class Search(Protocol):
    """Strategy: a function of its settings and of the trials so far.

    With the same trials in the same order it proposes the same candidates, so a search resumes by
    a replay of the logged trials (``ledger.replay``).
    """

    def ask(self, count: int) -> list[dict[str, Plain]]:
        """Return at most ``count`` candidates to evaluate.

        None while trials are awaited that decide on them, or when the search has ended.
        """

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take trials of candidates that were asked for, in the order in which they ended."""

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the progress as plain data."""


def key_of(candidate: Candidate) -> tuple[tuple[str, str], ...]:
    """Return a key that equal candidates share, in whatever order their values are."""
    return tuple(sorted((name, repr(_plain(value))) for name, value in candidate.items()))


def _plain(value: Any) -> Any:
    """Return a value as a ledger has it, such as tuples as lists."""
    return value if type(value) in (bool, int, str) else json.loads(json.dumps(strict(value)))
