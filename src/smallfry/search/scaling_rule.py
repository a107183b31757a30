"""Scaling rules: the settings of a network for a budget, fitted on samples.

    front ← samples that no other beats in accuracy and cost, until a fifth is kept
    axis(c) ← Gaussian process on the front, over ln c              for all axes but the remainder
    remainder ← so that the network's measured cost is c

The "tiny" rule of Han et al., "Model Rubik's Cube", NeurIPS 2020 (arXiv 2010.14819), for any axes:
they fit resolution and depth, and width is what is left. The closed form w = √(c / d r²) misses the
budget, as stems and heads don't shrink and counts are rounded, so the cost is measured.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.search.gaussian_process import GaussianProcess, fit_gaussian_process

__all__ = [
    "Sample",
    "ScalingRule",
    "fit_scaling_rule",
    "giant_rule",
    "pareto_front",
    "solve_remainder",
]

KEPT = 0.2  # share of the samples on the front
FEWEST = 5  # samples on the front
GIANT = {"depth": 1.2, "width": 1.1, "resolution": 1.15}  # EfficientNet's bases


class Sample(NamedTuple):
    """Trained network."""

    settings: Mapping[str, float]  # by axis, 1 for the base network's or in its own units
    macs: float
    accuracy: float


class Prediction(NamedTuple):
    """Settings for a budget."""

    settings: dict[str, float]  # of the fitted axes
    deviations: dict[str, float]  # standard deviations of the fit


@dataclass(frozen=True)
class ScalingRule:
    """Fitted rule: ``rule(budget)`` gives the settings of its axes.

    Args:
        fits: Regression of each fitted axis over the logarithm of cost.
        remainder: Axis that meets the budget.
        front: Samples that were fitted, by rising cost.
        ranges: Least and greatest setting of each axis in the samples.
        costs: Least and greatest cost of the front.
    """

    fits: Mapping[str, GaussianProcess]
    remainder: str
    front: tuple[Sample, ...]
    ranges: Mapping[str, tuple[float, float]]
    costs: tuple[float, float]

    def __call__(self, budget: float) -> Prediction:
        """Predict the fitted axes for a budget in MACs, within the range of the samples.

        Raises:
            UsageError: A budget that is not positive.

        Warns:
            SmallfryWarning: The budget, or a prediction, lies outside of what was sampled.
        """
        if not budget > 0:
            raise UsageError(f"a budget in MACs must be positive, not {budget}")
        if not self.costs[0] <= budget <= self.costs[1]:
            warnings.warn(
                f"a budget of {budget / 1e6:,.1f} MMAC is outside the sampled "
                f"{self.costs[0] / 1e6:,.1f} to {self.costs[1] / 1e6:,.1f}",
                SmallfryWarning,
                stacklevel=2,
            )
        settings, deviations = {}, {}
        for axis, fit in self.fits.items():
            value, deviations[axis] = fit(math.log(budget))
            low, high = self.ranges[axis]
            settings[axis] = min(max(value, low), high)
            if settings[axis] != value:
                warnings.warn(
                    f"{axis} {value:.3g} is outside the sampled {low:.3g} to {high:.3g}: taken "
                    f"{settings[axis]:.3g}",
                    SmallfryWarning,
                    stacklevel=2,
                )
        return Prediction(settings, deviations)

    def build(
        self,
        budget: float,
        cost: Callable[[Mapping[str, float]], float],
        within: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """Find the settings of all axes whose measured cost is the budget.

        Args:
            budget: MACs.
            cost: Measures the MACs of a network by its settings, such as
                ``smallfry.cost(create(**settings), images).macs``.
            within: Least and greatest remainder; default what was sampled.

        Raises:
            UsageError: The budget is out of reach in this range.
        """
        settings = dict(self(budget).settings)
        low, high = within or self.ranges[self.remainder]

        def cost_of(remainder: float) -> float:
            return cost({**settings, self.remainder: remainder})

        return {**settings, self.remainder: solve_remainder(cost_of, budget, low, high)}


def fit_scaling_rule(
    samples: Sequence[Sample],
    axes: Sequence[str] = ("resolution", "depth"),
    remainder: str = "width",
) -> ScalingRule:
    """Fit a rule to trained networks.

    Args:
        samples: About a hundred, at random settings.
        axes: Fitted axes.
        remainder: Axis that meets the budget.

    Raises:
        UsageError: Too few samples, or ones without one of the axes.

    Example:
        >>> from smallfry.search import Sample, fit_scaling_rule
        >>> samples = [Sample({"depth": c, "width": c}, 1e6 * c**3, c) for c in (1, 2, 3, 4, 5, 6)]
        >>> rule = fit_scaling_rule(samples, axes=("depth",))
        >>> round(rule(27e6).settings["depth"], 1)
        3.0
    """
    for axis in (*axes, remainder):
        if any(axis not in sample.settings for sample in samples):
            raise UsageError(f"samples need a setting of '{axis}'")
    if len(samples) < FEWEST:
        raise UsageError(f"a rule needs at least {FEWEST} samples, not {len(samples)}")
    if any(not 0 < sample.macs < math.inf for sample in samples):
        raise UsageError("samples need positive macs, and finite ones")
    if any(not math.isfinite(sample.accuracy) for sample in samples):
        raise UsageError("samples need finite accuracies: leave out networks that diverged")
    front = pareto_front(samples, max(FEWEST, math.ceil(KEPT * len(samples))))
    logs = np.log([sample.macs for sample in front])
    fits = {
        axis: fit_gaussian_process(logs, np.array([s.settings[axis] for s in front], float))
        for axis in axes
    }
    ranges = {
        axis: (min(values), max(values))
        for axis in (*axes, remainder)
        if (values := [sample.settings[axis] for sample in samples])
    }
    return ScalingRule(fits, remainder, front, ranges, (front[0].macs, front[-1].macs))


def pareto_front(samples: Sequence[Sample], least: int) -> tuple[Sample, ...]:
    """Collect non-dominated fronts one after another until enough samples are kept.

    A sample is dominated by one that is as accurate for less cost, or more accurate for no more.

    Args:
        samples: Any number.
        least: Samples to keep, in whole fronts.
    """
    left, kept = sorted(samples, key=lambda s: (s.macs, -s.accuracy)), list[Sample]()
    while left and len(kept) < least:
        front, rest = [left[0]], list[Sample]()
        for sample in left[1:]:
            best = front[-1]
            is_equal = (sample.macs, sample.accuracy) == (best.macs, best.accuracy)
            (front if sample.accuracy > best.accuracy or is_equal else rest).append(sample)
        left = rest
        kept += front
    return tuple(sorted(kept, key=lambda s: s.macs))


def solve_remainder(
    cost: Callable[[float], float], budget: float, low: float, high: float, steps: int = 40
) -> float:
    """Find the setting whose measured cost is closest to a budget, by bisection.

    Args:
        cost: Grows with the setting, in steps where counts are rounded.
        budget: MACs.
        low: Least setting.
        high: Greatest.
        steps: Halvings of the range, which stops earlier at a thousandth of a step.

    Raises:
        UsageError: The budget is out of reach.
    """
    least, most = cost(low), cost(high)
    if not least <= budget <= most:
        raise UsageError(
            f"a budget of {budget / 1e6:,.1f} MMAC is out of reach: {least / 1e6:,.1f} to "
            f"{most / 1e6:,.1f}"
        )
    tried = [(abs(least - budget), low), (abs(most - budget), high)]
    for _ in range(steps):
        middle = (low + high) / 2
        spent = cost(middle)
        tried.append((abs(spent - budget), middle))
        low, high = (middle, high) if spent < budget else (low, middle)
        if high - low < 1e-3 * abs(high) or spent == budget:
            break
    return min(tried)[1]


def giant_rule(share: float) -> dict[str, float]:
    """Compute EfficientNet's compound scaling, inverted, for a share of the base's MACs.

    d = 1.2^φ, w = 1.1^φ, r = 1.15^φ with φ = ln c / ln(1.2 · 1.1² · 1.15²). The baseline for fitted
    rules (Tan and Le 2019, arXiv 1905.11946).

    Raises:
        UsageError: A share that is not positive.

    Example:
        >>> {name: round(factor, 2) for name, factor in giant_rule(0.5).items()}
        {'depth': 0.82, 'width': 0.9, 'resolution': 0.86}
    """
    if not share > 0:
        raise UsageError(f"the share of the base's MACs must be positive, not {share}")
    growth = GIANT["depth"] * GIANT["width"] ** 2 * GIANT["resolution"] ** 2
    phi = math.log(share) / math.log(growth)
    return {axis: base**phi for axis, base in GIANT.items()}
