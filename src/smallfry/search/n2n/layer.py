"""Layers of a teacher as the policies see them: relative sizes, so that policies transfer."""

from collections.abc import Sequence
from dataclasses import dataclass

from smallfry.errors import UsageError
from smallfry.search.space import Choice

__all__ = ["NUMBERS", "REMOVED", "Layer", "choices_of"]

NUMBERS = 5  # of a descriptor
REMOVED = 0.0  # share of a layer that is removed


@dataclass(frozen=True)
class Layer:
    """Layer of a teacher, or several that are changed together.

    Args:
        name: Its name in candidates.
        shares: Shares of its width that a student may have, 1 among them; 0 removes it.
        kernel: Size of its kernel in pixels, 1 of a linear layer.
        stride: Its stride.
        inputs: Its inputs, as a share of the teacher's widest layer.
        outputs: Its outputs, likewise.

    Example:
        >>> Layer("conv1", (0.0, 0.5, 1.0), kernel=3, inputs=0.1, outputs=0.5).descriptor(0.0)
        [0.3, 0.25, 0.1, 0.5, 0.0]
    """

    name: str
    shares: tuple[float, ...]
    kernel: int = 1
    stride: int = 1
    inputs: float = 1.0
    outputs: float = 1.0

    def __post_init__(self) -> None:
        if 1.0 not in self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise UsageError(f"{self.name}: shares are 0 to 1 and have 1, not {self.shares}")

    @property
    def is_removable(self) -> bool:
        """True if a student may do without it."""
        return REMOVED in self.shares

    @property
    def widths(self) -> tuple[float, ...]:
        """Shares but that of a removed layer."""
        return tuple(share for share in self.shares if share != REMOVED)

    def descriptor(self, position: float) -> list[float]:
        """Return numbers of 0 to 1 that describe it.

        Args:
            position: 0 for the first layer to 1 for the last one.
        """
        return [
            min(self.kernel, 10) / 10,
            min(self.stride, 4) / 4,
            self.inputs,
            self.outputs,
            position,
        ]


def choices_of(layers: Sequence[Layer]) -> tuple[Choice, ...]:
    """Return the choices of a teacher's students: for each layer, its share."""
    return tuple(Choice(layer.name, layer.shares) for layer in layers)
