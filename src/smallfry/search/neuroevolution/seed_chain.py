"""Weights as a chain of random seeds (Such et al. 2017, arXiv 1712.06567).

    θ₀ = init(s₀),   θᵢ = θᵢ₋₁ + pᵢ ε(sᵢ)

with normal ε(s) from a counter-based generator, in float32 and in this order: the same weights to
the bit in any process with the same NumPy, whose normals may change between versions; a file
therefore has NumPy's version and the digest of the weights, and is refused where these differ.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import RunError, UsageError
from smallfry.io.replace import write_whole
from smallfry.search.neuroevolution.network import Array, parameters_of
from smallfry_runtime.files import read_bytes

__all__ = ["SeedChain", "normals"]

FORMAT = 1
LAST = 0.1  # standard deviation of the last layer's weights before division by √inputs
MOST_BYTES, MOST_WEIGHTS = 2**24, 10**8
MOST_SEED = 2**63


@dataclass(frozen=True)
class SeedChain:
    """Multilayer perceptron whose weights follow from seeds.

    Args:
        sizes: Widths from the inputs to the outputs.
        seed: Seed of the first weights.
        steps: Seed and size of each mutation.

    Example:
        >>> chain = SeedChain((2, 3, 1), 7).child(8, 0.1)
        >>> chain.weights().shape
        (13,)
    """

    sizes: tuple[int, ...]
    seed: int
    steps: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        right = len(self.sizes) > 1 and all(type(s) is int and s > 0 for s in self.sizes)
        seeds = (self.seed, *(seed for seed, _ in self.steps))
        right = right and all(type(seed) is int and 0 <= seed < MOST_SEED for seed in seeds)
        if not right or not all(math.isfinite(power) for _, power in self.steps):
            raise UsageError(
                "a chain needs two or more positive sizes, seeds of 0 to below 2**63, and finite "
                "sizes of mutations"
            )

    def child(self, seed: int, power: float) -> "SeedChain":
        """Return the chain with one more mutation."""
        return SeedChain(self.sizes, self.seed, (*self.steps, (seed, power)))

    def weights(self, parent: Array | None = None) -> Array:
        """Compute the weights, (parameters,).

        Args:
            parent: Weights without the last mutation, if they are known.
        """
        if parent is not None and self.steps:
            return _mutated(parent, *self.steps[-1])
        found = self._first()
        for step in self.steps:
            found = _mutated(found, *step)
        return found

    def save(self, file: Path, about: str = "") -> None:
        """Write the chain.

        Args:
            file: A JSON file.
            about: What the network is for.

        Raises:
            OSError: It can't be written.
        """
        content = {
            "format": FORMAT,
            "about": about,
            "numpy": np.__version__,
            "sizes": self.sizes,
            "seed": self.seed,
            "steps": self.steps,
            "sha256": _digest(self.weights()),
        }
        write_whole(file, (json.dumps(content, separators=(",", ":")) + "\n").encode())

    @classmethod
    def load(cls, file: Path) -> "SeedChain":
        """Read a chain, and verify that it gives the weights that it was written with.

        Raises:
            RunError: It is no chain, is damaged, or this NumPy has other normals.
        """
        try:
            content = json.loads(read_bytes(file, MOST_BYTES))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            steps = tuple((seed, float(power)) for seed, power in content["steps"])
            chain = cls(tuple(content["sizes"]), content["seed"], steps)
            if parameters_of(chain.sizes) > MOST_WEIGHTS:
                raise ValueError(f"more than {MOST_WEIGHTS:,} weights")
            expected, version = str(content["sha256"]), str(content["numpy"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, UsageError) as error:
            raise RunError(f"{file}: no chain of seeds ({error})") from error
        if _digest(chain.weights()) != expected:
            raise RunError(
                f"{file}: the seeds give other weights than those it was written with, by NumPy "
                f"{version}; here is {np.__version__}: install that version"
            )
        return chain

    def to_list(self) -> list[Any]:
        """Convert to plain data, without the sizes."""
        return [self.seed, [list(step) for step in self.steps]]

    @classmethod
    def from_list(cls, sizes: Sequence[int], content: Sequence[Any]) -> "SeedChain":
        """Parse what ``to_list`` gave."""
        return cls(tuple(sizes), content[0], tuple((seed, power) for seed, power in content[1]))

    def _first(self) -> Array:
        """Draw the first weights; biases are zero."""
        found, start = normals(self.seed, parameters_of(self.sizes)), 0
        pairs = list(pairwise(self.sizes))
        for number, (inputs, outputs) in enumerate(pairs):
            deviation = (LAST if number == len(pairs) - 1 else 1.0) / math.sqrt(inputs)
            end = start + inputs * outputs
            found[start:end] *= np.float32(deviation)
            found[end : end + outputs] = 0
            start = end + outputs
        return found


def normals(seed: int, count: int) -> NDArray[np.float32]:
    """Draw normal numbers in float32, a pure function of the seed and NumPy's version."""
    return np.random.Generator(np.random.Philox(seed)).standard_normal(count, dtype=np.float32)


def _mutated(weights: Array, seed: int, power: float) -> Array:
    return weights + np.float32(power) * normals(seed, len(weights))


def _digest(weights: Array) -> str:
    return hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest()
