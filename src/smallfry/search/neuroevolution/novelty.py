"""Novelty of behaviours: distance to the nearest ones so far (Lehman, Stanley 2011)."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["novelties"]

Array = NDArray[np.float64]


def novelties(behaviours: Array, archive: Array, nearest: int = 25) -> Array:
    """Compute the mean distance of each behaviour to its nearest others.

    Args:
        behaviours: Of a population, (individuals, numbers).
        archive: Of earlier ones, (archived, numbers).
        nearest: Number of neighbours, in the population and the archive.

    Returns:
        (individuals,).

    Example:
        >>> novelties(np.array([[0.0], [1.0], [9.0]]), np.empty((0, 1)), nearest=1).tolist()
        [1.0, 1.0, 8.0]
    """
    every = np.concatenate([behaviours, archive])
    squares = np.square(behaviours[:, None] - every[None]).sum(2)
    np.fill_diagonal(squares, np.inf)  # itself
    count = min(nearest, len(every) - 1)
    if count < 1:
        return np.zeros(len(behaviours))
    found: Array = np.sqrt(np.partition(squares, count - 1, axis=1)[:, :count]).mean(1)
    return found
