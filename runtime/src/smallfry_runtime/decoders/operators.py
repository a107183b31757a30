"""Fields of numbers, in physical units."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import require_no_settings

__all__ = ["decode"]

DIGITS = 7  # significant ones of a value, as float32 has


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode fields (samples, fields, height, width) to rows of numbers by their names.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> decode(np.ones((1, 1, 1, 2)), ["field"])
        [{'maximum': 1.0, 'minimum': 1.0, 'mean': 1.0, 'fields': {'field': [[1.0, 1.0]]}}]
    """
    require_no_settings(settings)
    return [
        {
            "maximum": float(sample.max()),
            "minimum": float(sample.min()),
            "mean": float(sample.mean()),
            "fields": {
                name: [[_short(value) for value in row] for row in field.tolist()]
                for name, field in zip(classes, sample, strict=True)
            },
        }
        for sample in outputs
    ]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else value
