"""Analysis of variance: whether programs differ by more than seeds do."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smallfry.errors import UsageError

__all__ = ["Variances", "analyse_variance", "compare_variances"]


class Variances(NamedTuple):
    """One-way analysis of variance."""

    between: float  # mean square between the groups
    within: float  # mean square within them
    f: float  # their ratio
    degrees: tuple[int, int]  # of freedom
    p: float  # probability of this ratio or a greater one, if all groups have one mean
    component: float  # variance of the groups' means without that of their members; 0 at least


def analyse_variance(groups: Sequence[Sequence[float]]) -> Variances:
    """Analyse the variance between groups of numbers against that within them.

    Args:
        groups: Two at least, together with more numbers than groups, which needn't be of one size.

    Raises:
        UsageError: Fewer groups or numbers.

    Example:
        >>> analyse_variance([[1.0, 2.0], [5.0, 6.0]]).f
        32.0
    """
    from scipy.stats import f as distribution

    members = [np.asarray(group, np.float64) for group in groups]
    count = sum(map(len, members))
    if len(members) < 2 or count <= len(members) or not all(map(len, members)):
        raise UsageError(
            "an analysis of variance needs two groups at least, and more numbers than groups, not "
            f"{count} numbers in {len(members)} groups"
        )
    degrees = (len(members) - 1, count - len(members))
    mean = np.concatenate(members).mean()
    between = sum(len(each) * (each.mean() - mean) ** 2 for each in members) / degrees[0]
    within = sum(((each - each.mean()) ** 2).sum() for each in members) / degrees[1]
    ratio = _ratio(between, within)
    size = (count - sum(len(each) ** 2 for each in members) / count) / degrees[0]
    p = float(distribution.sf(ratio, *degrees))
    component = max(0.0, float((between - within) / size))
    return Variances(float(between), float(within), ratio, degrees, p, component)


def _ratio(one: float, other: float) -> float:
    """Divide variances, of which the second may be 0."""
    if not other:
        return math.inf if one else math.nan
    return float(one / other)


def compare_variances(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Compare the variances of two samples of normal numbers.

    Returns:
        The ratio of the first to the second, and the probability of it or a greater one if both are
        of equal variance.

    Raises:
        UsageError: Fewer than two numbers in a sample.
    """
    from scipy.stats import f as distribution

    if min(len(one), len(other)) < 2:
        raise UsageError("a variance needs two numbers at least")
    ratio = _ratio(float(np.var(one, ddof=1)), float(np.var(other, ddof=1)))
    return ratio, float(distribution.sf(ratio, len(one) - 1, len(other) - 1))
