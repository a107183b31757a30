"""Classes of images, from logits, without PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import require_no_settings

__all__ = ["decode"]


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (images, classes) to the ``label`` and the ``probabilities`` of all.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> decode(np.zeros((1, 2)), ["no", "yes"])
        [{'label': 'no', 'probabilities': {'no': 0.5, 'yes': 0.5}}]
    """
    require_no_settings(settings)
    logits = np.asarray(outputs, np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return [
        {
            "label": classes[int(row.argmax())],
            "probabilities": dict(zip(classes, row.tolist(), strict=True)),
        }
        for row in shares
    ]
