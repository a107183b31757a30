"""Classes of the nodes of a graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import require_no_settings

__all__ = ["decode"]


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (graphs, classes, nodes) to the class of each node and its probability.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> decode(np.array([[[0.0, 9.0], [0.0, 0.0]]]), ["a", "b"])
        [{'nodes': [{'class': 'a', 'probability': 0.5}, {'class': 'a', 'probability': 0.9999}]}]
    """
    require_no_settings(settings)
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)
    return [
        {
            "nodes": [
                {"class": classes[int(c)], "probability": round(float(sample[c, node]), 4)}
                for node, c in enumerate(chosen)
            ]
        }
        for sample, chosen in zip(shares, best, strict=True)
    ]
