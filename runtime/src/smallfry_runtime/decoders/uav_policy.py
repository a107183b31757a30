"""Actions of a flight policy, chosen from logits, without PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from smallfry_runtime.decoders import classified, require_no_settings

__all__ = ["decode"]


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (images, actions) to the best ``action`` and all ``probabilities``.

    Raises:
        UsageError: There are settings, and it has none.
    """
    require_no_settings(settings)
    return classified(outputs, classes, "action")
