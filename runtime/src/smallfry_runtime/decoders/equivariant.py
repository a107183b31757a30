"""Classes of images, from logits, without PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from smallfry_runtime.decoders import classified, require_no_settings

__all__ = ["decode"]


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (images, classes) to the ``label`` and the ``probabilities`` of all.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> import numpy as np
        >>> decode(np.zeros((1, 2)), ["no", "yes"])
        [{'label': 'no', 'probabilities': {'no': 0.5, 'yes': 0.5}}]
    """
    require_no_settings(settings)
    return classified(outputs, classes, "label")
