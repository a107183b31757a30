"""States of EEG windows, with their probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import classified, require_no_settings

__all__ = ["decode", "right"]


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (windows, states) to the ``state`` and the probability of each.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> decode(np.array([[0.0, 0.0]]), ["alert", "drowsy"])
        [{'state': 'alert', 'probabilities': {'alert': 0.5, 'drowsy': 0.5}}]
    """
    require_no_settings(settings)
    return classified(outputs, classes, "state")


def right(outputs: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the windows (windows,) whose likeliest state is the label."""
    return np.asarray(outputs.argmax(axis=-1) == labels)
