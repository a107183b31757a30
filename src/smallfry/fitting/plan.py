"""Plan of a fit: its candidates with their costs and speeds, measured once, and the epochs.

Whatever is decided later is a function of the plan and of validation scores, never of a clock, so
that a fit that was stopped decides as an undisturbed one.

    seconds = cores · 60 · minutes − planning − exports           CPU seconds of training
    rung r  trains its n_r candidates in share_r · seconds / n_r each, to whole epochs
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from smallfry.errors import RunError, UsageError
from smallfry.fitting.config import Budget
from smallfry.fitting.costs import Costs
from smallfry.fitting.zoo import Entry
from smallfry.io.json import strict
from smallfry.io.replace import write_whole
from smallfry.training.progress import clock

SHARES = (0.3, 0.3, 0.4)  # of the training, by rung
TUNED = 0.25  # share of fine-tuning with compression, where a candidate needs it
FEWEST, MOST = 4, 9  # candidates of the first rung
STARTING = 2.5  # CPU seconds of a run beside its training
EXPORTING = 40.0  # CPU seconds of the exports and their verification
MOST_BESIDE = 0.5  # share of the minutes that is not training, at most


@dataclass(frozen=True)
class Planned:
    """Candidate of a plan.

    Args:
        entry: Its architecture.
        costs: Costs before compression.
        epoch_seconds: CPU seconds of an epoch.
        precision: Precision of the training; None for that of the recipe.
    """

    entry: Entry
    costs: Costs
    epoch_seconds: float
    precision: str | None = None

    @property
    def name(self) -> str:
        """Name of the candidate."""
        return self.entry.name

    def fits(self, budget: Budget) -> bool:
        """Return whether its int8 or float32 export is within the budget."""
        return any(budget.fits(self.costs.kb[p], self.costs.ms[p]) for p in self.costs.kb)


@dataclass(frozen=True)
class Plan:
    """Plan of a fit.

    Args:
        candidates: Those of the first rung, or to choose them from.
        counts: Candidates in each rung.
        seconds: CPU seconds of training in all rungs.
        tuning_seconds: CPU seconds of fine-tuning with compression.
        threads: CPU threads.
        fingerprint: Of the data.
        left_out: Reasons by candidate.
    """

    candidates: tuple[Planned, ...]
    counts: tuple[int, ...]
    seconds: float
    tuning_seconds: float
    threads: int
    fingerprint: str
    left_out: Mapping[str, str]

    def find(self, name: str) -> Planned:
        """Return a candidate by its name."""
        return next(each for each in self.candidates if each.name == name)

    def epochs(self, name: str, rung: int) -> int:
        """Return the epochs of a candidate until the end of a rung, more in each."""
        seconds, epoch = 0.0, self.find(name).epoch_seconds
        found = 0
        for share, count in zip(shares(len(self.counts))[: rung + 1], self.counts, strict=False):
            seconds += share * self.seconds / count
            found = max(found + 1, math.floor(seconds / epoch + 0.5))
        return found

    def write(self, file: Path) -> None:
        """Write the plan as JSON."""
        write_whole(file, (json.dumps(strict(asdict(self)), indent=1) + "\n").encode())


def read_plan(file: Path) -> Plan | None:
    """Read a plan; None if it is not there yet.

    Raises:
        RunError: It is damaged.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: damaged ({error}); remove it and the runs beside it") from error
    try:
        candidates = tuple(_planned(each) for each in content.pop("candidates"))
        counts = tuple(content.pop("counts"))
        if not 1 <= len(counts) <= len(SHARES) or not all(type(n) is int and n > 0 for n in counts):
            raise TypeError("expected the candidates of each rung")
        if not candidates or not all(each.epoch_seconds > 0 for each in candidates):
            raise TypeError("expected candidates with the seconds of an epoch")
        return Plan(candidates, counts, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: damaged ({error!r}); remove it and the runs beside it") from None


def shares(rungs: int) -> tuple[float, ...]:
    """Return the share of each rung in the seconds of training."""
    last = SHARES[len(SHARES) - rungs :]
    return tuple(share / sum(last) for share in last)


def rung_counts(first: int) -> tuple[int, ...]:
    """Return the candidates of each rung.

    Example:
        >>> rung_counts(9), rung_counts(4), rung_counts(2), rung_counts(1)
        ((9, 3, 1), (4, 2, 1), (2, 1), (1,))
    """
    if first <= 2:
        return tuple(range(first, 0, -1))
    return first, max(2, first // 3), 1


def first_count(minutes: float) -> int:
    """Return the candidates of the first rung, more in a longer fit.

    Example:
        >>> [first_count(minutes) for minutes in (1, 10, 30, 60)]
        [4, 4, 7, 9]
    """
    return max(FEWEST, min(MOST, round(3 + minutes / 8)))


class Spent(NamedTuple):
    """CPU seconds of a fit: all, and those of its plan."""

    total: float
    planning: float


def training_seconds(spent: Spent, runs: int) -> float:
    """Return the CPU seconds that are left to train so many runs."""
    beside = spent.planning + EXPORTING + STARTING * runs
    return spent.total - min(beside, MOST_BESIDE * spent.total)


def affordable(
    candidates: Sequence[Planned], counts: Sequence[int], seconds: float, minutes: float
) -> tuple[list[Planned], dict[str, str]]:
    """Split candidates into those that are trained for an epoch in the first rung, and others.

    Args:
        candidates: The candidates.
        counts: Candidates in each rung.
        seconds: CPU seconds of training in all rungs.
        minutes: Of the fit, for the error.

    Returns:
        The former, and reasons by name of the others.

    Raises:
        UsageError: There is time for an epoch of none.
    """
    each = shares(len(counts))[0] * seconds / counts[0]
    kept = [c for c in candidates if c.epoch_seconds <= 2 * each]  # to the nearest epoch
    reasons = {
        c.name: f"an epoch takes {clock(c.epoch_seconds)}, the first rung {clock(each)}"
        for c in candidates
        if c not in kept
    }
    if not kept and candidates:
        quickest = min(candidates, key=lambda c: c.epoch_seconds)
        needed = minutes * quickest.epoch_seconds / (2 * each)
        raise UsageError(
            f"{minutes:g} minutes are too few for an epoch of any candidate; the quickest, "
            f"{quickest.name}, needs about {math.ceil(10 * needed) / 10:g}: give more --minutes, "
            "or fewer images (--data.limit)"
        )
    return kept, reasons


def _planned(content: Mapping[str, Any]) -> Planned:
    values = dict(content)
    return Planned(Entry(**values.pop("entry")), Costs(**values.pop("costs")), **values)
