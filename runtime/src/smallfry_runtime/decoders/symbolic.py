"""Rules of matrices, with their probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from smallfry_runtime.decoders import classified, require_no_settings

__all__ = ["decode"]


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (matrices, classes) to the ``colour`` rule and the probability of each.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> import numpy as np
        >>> decode(np.array([[0.0, 0.0]]), ["changing", "constant"])
        [{'colour': 'changing', 'probabilities': {'changing': 0.5, 'constant': 0.5}}]
    """
    require_no_settings(settings)
    return classified(outputs, classes, "colour")
