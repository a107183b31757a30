"""Random numbers that depend on a seed and an index alone, so that any order draws the same."""

import numpy as np
from numpy.typing import NDArray


def uniform(count: int, seed: int, *index: int) -> NDArray[np.float64]:
    """So many numbers from 0 to below 1, a pure function of the seed and up to three indices.

    They come straight from Philox, whose stream NumPy keeps the same for all time; it promises
    no such thing of the distributions of ``Generator``.
    """
    counter = np.zeros(4, dtype=np.uint64)  # Philox itself counts in the first word
    counter[1 : 1 + len(index)] = index
    philox = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter)
    return (philox.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
