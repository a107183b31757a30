"""Counter-based random numbers: a pure function of seed and index, in any order."""

import zlib

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError


def uniform(count: int, seed: int, *index: int) -> NDArray[np.float64]:
    """Draw numbers in [0, 1) as a pure function of the seed and up to three indices.

    They come straight from Philox, whose stream NumPy keeps the same for all time; it promises
    no such thing of the distributions of ``Generator``.
    """
    counter = np.zeros(4, dtype=np.uint64)  # Philox itself counts in the first word
    counter[1 : 1 + len(index)] = index
    philox = np.random.Philox(key=_key(seed, seed, 0), counter=counter)
    return (philox.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(family: str | int, seed: int, *index: int) -> np.random.Generator:
    """Create the generator of one item of generated data, independent of all other items.

    Args:
        family: Name of the data with its version, or a number in its place.
        seed: The seed of the data.
        index: Up to three whole numbers from 0: the item.

    Raises:
        UsageError: A seed below 0, or of more than 64 bits.
    """
    name = zlib.crc32(family.encode()) if isinstance(family, str) else family
    counter = np.zeros(4, np.uint64)  # Philox itself counts in the first word
    counter[1 : 1 + len(index)] = index
    return np.random.Generator(np.random.Philox(key=_key(seed, name, seed), counter=counter))


def _key(seed: int, *words: int) -> NDArray[np.uint64]:
    if not 0 <= seed < 2**64:
        raise UsageError(f"a seed is a whole number from 0 to 2^64 - 1, got {seed}")
    return np.array(words, np.uint64)
