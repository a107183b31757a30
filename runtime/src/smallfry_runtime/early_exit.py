"""Early exit: stop recursing once the halting probability passes a threshold.

The halting probability is a model's confidence, on a scale of its own. The cost of a threshold in
accuracy and its saving in steps are measured on images that were not trained on, for every
threshold that makes a difference, and the threshold is chosen there.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import SmallfryWarning, UsageError

NEVER = 1.01  # a threshold that no probability passes
THRESHOLDS = 200  # looked at, at equal shares of all halting probabilities
FEW = 100  # images, of fewer of which an accuracy has steps of over a percent


class Trace(NamedTuple):
    """Predictions and halting probabilities of each image after each recursion step."""

    right: NDArray[np.bool_]  # (steps, images)
    halting: NDArray[np.float32]  # (steps, images), probability of being right, by the model itself


class Point(NamedTuple):
    """Accuracy and mean number of steps at one threshold."""

    threshold: float
    accuracy: float
    steps: float  # recursion steps an image, on average


def warn_of_few(images: int) -> None:
    """Warn if thresholds are measured on too few images to generalise."""
    if images < FEW:
        warnings.warn(
            f"early-exit thresholds were measured on only {images} validation images and are "
            f"unreliable for others; hold out {FEW} or more (data.validation)",
            SmallfryWarning,
            stacklevel=3,
        )


def operating_points(traced: Trace) -> list[Point]:
    """Measure accuracy and steps at each threshold, from the fewest steps to all of them."""
    shares = np.linspace(0, 1, THRESHOLDS)
    early = traced.halting[:-1].astype(np.float64).ravel()
    candidates = np.quantile(early, shares).tolist() if len(early) else []
    return [_point(traced, threshold) for threshold in sorted({0.0, *candidates, NEVER})]


def most_thrifty(points: Sequence[Point], drop: float) -> Point:
    """Choose the point with the fewest steps whose accuracy drops by at most ``drop``.

    Raises:
        UsageError: ``drop`` is no share of accuracy.
    """
    if not 0 <= drop <= 1:
        raise UsageError(
            f"exit_drop must be a share of accuracy from 0 to 1, such as 0.003, not {drop}"
        )
    enough = points[-1].accuracy - drop
    return min((p for p in points if p.accuracy >= enough - 1e-9), key=lambda p: p.steps)


def most_accurate(points: Sequence[Point], steps: float) -> Point:
    """Choose the most accurate point within a budget of mean steps.

    Raises:
        UsageError: Fewer than one step, or not a number.
    """
    cheap = [p for p in points if p.steps <= steps + 1e-9]
    if not cheap:
        raise UsageError(f"exit_steps must be at least 1, not {steps}")
    return max(cheap, key=lambda p: (p.accuracy, -p.steps))


def require_threshold(threshold: float) -> float:
    """Validate a halting threshold and return it.

    Raises:
        UsageError: It is negative or not a number.
    """
    if not threshold >= 0:
        raise UsageError(
            f"exit_threshold must be a halting probability from 0 to 1 (above 1: all steps), not "
            f"{threshold}"
        )
    return threshold


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the Pareto-optimal points in accuracy and steps, always including the last."""
    kept: list[Point] = []
    for point in sorted(points[:-1], key=lambda p: (p.steps, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return [*kept, points[-1]]


def _point(traced: Trace, threshold: float) -> Point:
    leaves = traced.halting >= threshold
    leaves[-1] = True
    last = leaves.argmax(axis=0)  # the first step that passes
    right = np.take_along_axis(traced.right, last[None], axis=0)
    return Point(threshold, float(right.mean()), float(last.mean()) + 1)
