"""Importance of choices: the share of the variance of scores between their values.

    ε² = 1 − (SSW / (n − k)) / (SST / (n − 1))

SSW is the sum of squares within the k groups of equal values, SST that of all n scores (Kelley,
PNAS 1935); 0 is expected of a choice without influence. Ranges are divided at their quartiles.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from smallfry.search.space import Choice, Trial

__all__ = ["importances", "variance_share"]


def importances(choices: Sequence[Choice], trials: Sequence[Trial]) -> dict[str, float]:
    """Compute the importance of each choice, at least 0, from the trials that did not fail."""
    valued = [trial for trial in trials if trial.value is not None]
    return {choice.name: _importance(choice, valued) for choice in choices}


def _importance(choice: Choice, trials: Sequence[Trial]) -> float:
    having = [trial for trial in trials if choice.name in trial.candidate]
    values = [trial.candidate[choice.name] for trial in having]
    groups: list[Hashable] = [repr(value) for value in values]
    if not choice.values and having:
        edges = np.quantile(values, (0.25, 0.5, 0.75))
        groups = np.searchsorted(edges, values).tolist()
    return variance_share(groups, np.array([trial.value for trial in having], np.float64))


def variance_share(groups: Sequence[Hashable], scores: NDArray[np.float64]) -> float:
    """Compute ε², at least 0; 0 if there are too few scores, or all are equal.

    Example:
        >>> round(variance_share("aabb", np.array([1.0, 2.0, 3.0, 4.0])), 3)
        0.7
    """
    count, different = len(scores), set(groups)
    total = float(np.square(scores - scores.mean()).sum()) if count else 0.0
    if count <= len(different) or total == 0:
        return 0.0
    within = 0.0
    for group in different:
        part = scores[[each == group for each in groups]]
        within += float(np.square(part - part.mean()).sum())
    return max(0.0, 1 - within / (count - len(different)) * (count - 1) / total)
