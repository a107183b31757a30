"""Many small multilayer perceptrons at once, as rows of flat weights."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["forward", "parameters_of"]

Array = NDArray[np.float32]


def parameters_of(sizes: Sequence[int]) -> int:
    """Return the number of weights and biases.

    Example:
        >>> parameters_of((11, 16, 2))
        226
    """
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))


def forward(sizes: Sequence[int], weights: Array, inputs: Array) -> Array:
    """Compute the outputs of each network, with tanh behind all layers but the last.

    Args:
        sizes: Widths from the inputs to the outputs.
        weights: (networks, parameters).
        inputs: Of each network, (networks, batch, inputs).

    Returns:
        (networks, batch, outputs).
    """
    values, start, last = inputs, 0, len(sizes) - 2
    for number, (before, after) in enumerate(pairwise(sizes)):
        end = start + before * after
        matrix = weights[:, start:end].reshape(-1, before, after)
        values = values @ matrix + weights[:, None, end : end + after]
        start = end + after
        if number < last:
            values = np.tanh(values)
    return values
