"""Attributes of Gaussians, by the names of their columns."""

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
    """Decode attributes (samples, columns), before activation, to numbers by their names.

    Raises:
        UsageError: There are settings, and it has none.

    Example:
        >>> decode(np.array([[0.5, -2.0]]), ["opacity", "scale_0"])
        [{'opacity': 0.5, 'scale_0': -2.0}]
    """
    require_no_settings(settings)
    return [
        {
            name: float(f"{value:.{DIGITS}g}") if np.isfinite(value) else float(value)
            for name, value in zip(classes, sample.tolist(), strict=True)
        }
        for sample in outputs
    ]
