"""Rules of matrices, with their probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import require_no_settings

__all__ = ["decode", "right"]


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (matrices, classes) to the ``colour`` rule and the probability of each.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> decode(np.array([[0.0, 0.0]]), ["changing", "constant"])
        [{'colour': 'changing', 'probabilities': {'changing': 0.5, 'constant': 0.5}}]
    """
    require_no_settings(settings)
    shifted = outputs.astype(np.float64) - outputs.max(axis=-1, keepdims=True)
    shares = np.exp(shifted) / np.exp(shifted).sum(axis=-1, keepdims=True)
    return [
        {
            "colour": classes[int(row.argmax())],
            "probabilities": dict(zip(classes, row.tolist(), strict=True)),
        }
        for row in shares
    ]


def right(outputs: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the matrices (matrices,) whose likeliest class is the label."""
    return np.asarray(outputs.argmax(axis=-1) == labels)
