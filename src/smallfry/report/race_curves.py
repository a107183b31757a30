"""Loss curves of a race over steps, epochs and seconds, and bands over several runs.

A run is a list of points, each with ``step``, ``epoch``, ``seconds``, ``train`` and
``validation``. Between points a loss moves in a straight line on a logarithmic axis.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Axis = Literal["step", "epoch", "seconds"]
Loss = Literal["train", "validation"]
Points = Sequence[Mapping[str, Any]]

TINY = 1e-300  # stands for a loss of zero, which has no logarithm


class Run(NamedTuple):
    """Loss curves of one run."""

    points: Points
    diverged: bool  # its loss stopped being finite; its curve ends there


class Curve(NamedTuple):
    """Finite loss along one axis."""

    x: Array  # (points,), not decreasing
    loss: Array  # (points,)


class Band(NamedTuple):
    """Median and range of several runs, as long as they are finite."""

    x: Array  # (places,)
    median: Array  # (places,)
    low: Array  # (places,)
    high: Array  # (places,)
    diverged: bool  # at least half of the runs diverged, where the band ends


def time_to_reach(points: Points, target: float, loss: Loss = "train") -> float | None:
    """Return the seconds until a loss first reaches the target; None if it never does."""
    x, values = curve(points, "seconds", loss)
    reached = np.flatnonzero(values <= target)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0 or values[after] == target:
        return float(x[after])
    above, goal, below = (
        math.log(max(v, TINY)) for v in (values[after - 1], target, values[after])
    )
    share = (above - goal) / (above - below)
    return float(x[after - 1] + share * (x[after] - x[after - 1]))


def at_seconds(points: Points, seconds: float, loss: Loss = "train") -> float | None:
    """Interpolate the loss at a second; None before the first and after the last finite point."""
    found = curve(points, "seconds", loss)
    if not len(found.x) or not found.x[0] <= seconds <= found.x[-1]:
        return None
    return float(_interpolate(found, np.array([seconds]))[0])


def curve(points: Points, axis: Axis, loss: Loss) -> Curve:
    """Return the points up to the first non-finite loss; points without that loss are skipped."""
    x: list[float] = []
    values: list[float] = []
    for point in points:
        place, value = point.get(axis), point.get(loss)
        if place is None or value is None:
            continue
        if not (math.isfinite(place) and math.isfinite(value)):
            break
        x.append(place)
        values.append(value)
    return Curve(np.array(x, dtype=np.float64), np.array(values, dtype=np.float64))


def run_of(measured: Mapping[str, Any]) -> Run:
    """Convert a record's ``measured`` to a run; a non-finite loss means divergence."""
    points = measured.get("points") or []
    losses = [p.get(loss) for p in points for loss in ("train", "validation")]
    broken = any(value is not None and not math.isfinite(value) for value in losses)
    return Run(points, bool(measured.get("diverged")) or broken)


def last_second(run: Run) -> float:
    """Return the second of a run's last finite training loss; 0 without one."""
    x = curve(run.points, "seconds", "train").x
    return float(x[-1]) if len(x) else 0.0


def band(runs: Sequence[Run], axis: Axis, loss: Loss) -> Band:
    """Compute the median and range of runs on a common grid.

    A diverged run counts as infinite from its end on, so the band ends when half of the runs
    have diverged, else where the first run ends.
    """
    curves = [(curve(run.points, axis, loss), run.diverged) for run in runs]
    curves = [(found, diverged) for found, diverged in curves if len(found.x)]
    if not curves:
        nothing = np.empty(0)
        return Band(nothing, nothing, nothing, nothing, False)
    grid = np.unique(np.concatenate([found.x for found, _ in curves]))
    ends = [found.x[-1] for found, diverged in curves if not diverged]
    if ends:
        grid = grid[grid <= min(ends)]
    values = np.stack([_interpolate(found, grid) for found, _ in curves])
    for row, (found, _) in zip(values, curves, strict=True):
        row[grid > found.x[-1]] = math.inf
    median = np.median(values, axis=0)
    finite = np.isfinite(median)
    high = np.where(np.isfinite(values), values, -math.inf).max(axis=0)
    half = 2 * sum(diverged for _, diverged in curves) >= len(curves)
    return Band(grid[finite], median[finite], values.min(axis=0)[finite], high[finite], half)


def _interpolate(found: Curve, x: Array) -> Array:
    logs = np.interp(x, found.x, np.log(np.maximum(found.loss, TINY)))
    nearest = np.searchsorted(found.x, x).clip(max=len(found.x) - 1)
    measured = found.x[nearest] == x  # these as they are, without exp(log(.))'s last digit
    result: Array = np.where(measured, found.loss[nearest], np.exp(logs))
    return result
