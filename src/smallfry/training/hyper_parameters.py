"""Tunable hyper-parameters of a run: their ranges, and the map from unconstrained numbers.

value = low + (high − low) · sigmoid(λ)          of weight_decay, the same of its logarithm
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smallfry.errors import UsageError, nearest
from smallfry.settings import check

__all__ = ["TUNABLE", "Hyper", "find_hypers", "from_unconstrained", "to_unconstrained"]


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameter in an open range.

    Args:
        name: Its name.
        start: First value.
        low: Lower end.
        high: Upper end.
        log: Tune its logarithm.
    """

    name: str
    start: float
    low: float
    high: float
    log: bool = False

    def unconstrained(self) -> float:
        """Return λ of the first value."""
        return to_unconstrained(self.start, self.low, self.high, self.log)

    def value(self, unconstrained: Any) -> Any:
        """Return the value of λ, a tensor of any shape."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        found = low + (high - low) * unconstrained.sigmoid()
        return found.exp() if self.log else found


TUNABLE = {
    each.name: each
    for each in (
        Hyper("dropout", 0.05, 0.0, 0.95),
        Hyper("augment", 0.1, 0.0, 1.0),
        Hyper("noise", 0.1, 0.0, 2.0),
        Hyper("weight_decay", 1e-4, 1e-6, 1.0, log=True),
        Hyper("label_smoothing", 0.05, 0.0, 0.5),
    )
}
UNTUNABLE = {  # why, by name
    **dict.fromkeys(
        ("lr", "learning_rate", "batch_size", "momentum", "epochs"),
        "the best weights do not depend on it, so that the validation loss has no gradient for it",
    ),
    **dict.fromkeys(("depth", "layers", "width"), "it changes the shapes of the weights"),
}


def to_unconstrained(value: float, low: float, high: float, log: bool = False) -> float:
    """Map a value of an open range to a real number.

    Example:
        >>> to_unconstrained(4.0, 2, 24)
        -2.3025850929940455
    """
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return math.log(value - low) - math.log(high - value)


def from_unconstrained(number: float, low: float, high: float, log: bool = False) -> float:
    """Map a real number to a value of an open range."""
    if log:
        return math.exp(from_unconstrained(number, math.log(low), math.log(high)))
    return low + (high - low) / (1 + math.exp(-number))


def find_hypers(entries: Sequence[Any]) -> tuple[Hyper, ...]:
    """Find the hyper-parameters of a configuration.

    Args:
        entries: Names, or names with first values: ``["dropout", {"weight_decay": 0.001}]``.

    Raises:
        UsageError: One that can't be tuned, is there twice, or starts outside of its range.

    Example:
        >>> [(each.name, each.start) for each in find_hypers(["noise", {"dropout": 0.2}])]
        [('noise', 0.1), ('dropout', 0.2)]
    """
    found: list[Hyper] = []
    for entry in entries:
        given = entry if isinstance(entry, dict) else {entry: None}
        check(len(given) == 1, f"self_tune: expected NAME or NAME: START, not {entry!r}")
        ((name, start),) = given.items()
        if name in UNTUNABLE:
            raise UsageError(f"self_tune can't tune {name}: {UNTUNABLE[name]}")
        if name not in TUNABLE:
            raise UsageError(f"self_tune can't tune '{name}'{nearest(str(name), TUNABLE)}")
        hyper = TUNABLE[name]
        if start is not None:
            right = isinstance(start, int | float) and hyper.low < start < hyper.high
            where = f"between {hyper.low:g} and {hyper.high:g}"
            check(right, f"self_tune: {name} starts {where}, not at {start!r}")
            hyper = Hyper(name, float(start), hyper.low, hyper.high, hyper.log)
        check(all(each.name != name for each in found), f"self_tune has {name} twice")
        found.append(hyper)
    return tuple(found)
