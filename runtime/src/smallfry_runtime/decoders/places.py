"""Places of a route, of the scores of all."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import require_no_settings

__all__ = ["decode", "right"]

MOST = 5  # places of an answer


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode scores (images, places) to the ``place``, its ``score`` and the best five.

    An image that scores nothing anywhere has no place, None.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> decode(np.array([[0.0, 1.5], [0.0, 0.0]]), ["0", "1"])[1]
        {'place': None, 'score': 0.0, 'best': {}}
    """
    require_no_settings(settings)
    answers = []
    for row in outputs.astype(np.float64):
        best = [int(n) for n in np.argsort(-row, kind="stable")[:MOST] if row[n] != 0]
        answers.append(
            {
                "place": classes[best[0]] if best else None,
                "score": float(row[best[0]]) if best else 0.0,
                "best": {classes[n]: float(row[n]) for n in best},
            }
        )
    return answers


def right(outputs: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the images (images,) whose best place is the label, and has a score."""
    return np.asarray((outputs.argmax(axis=-1) == labels) & (outputs.max(axis=-1) != 0))
