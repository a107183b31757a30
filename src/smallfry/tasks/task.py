"""The contract of a task: targets, loss, likelihood, scores and decoding of a model's outputs.

The training loop, its objectives and the evaluation know no task but by this contract.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from smallfry.data import Split
from smallfry.models.contract import map_tensors

__all__ = ["Batch", "Pictured", "Task", "micro_batch_sizes"]


class Batch(NamedTuple):
    """Inputs with their targets, which only the task looks into.

    Both are tensors whose first dimension is the batch, in tuples, lists or dictionaries.
    """

    inputs: Tensor  # (batch, channels, size, size), normalised
    targets: Any

    def split(self, parts: int) -> list["Batch"]:
        """Micro-batches of this batch, none of them empty."""
        sizes = micro_batch_sizes(len(self.inputs), parts)
        ends = [*accumulate(sizes)]
        return [
            map_tensors(itemgetter(slice(end - size, end)), self)
            for size, end in zip(sizes, ends, strict=True)
        ]

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        moved: Batch = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), self)
        return moved


def micro_batch_sizes(images: int, parts: int) -> list[int]:
    """Sizes of the micro-batches of a batch: all equal but the last, which has the remainder."""
    size = -(-images // parts)
    return [min(size, images - start) for start in range(0, images, size)]


class Task(Protocol):
    """The meaning of a model's outputs.

    A task is a frozen dataclass, made by ``create``, and registered with ``tasks.register``.
    """

    name: ClassVar[str]

    @classmethod
    def create(cls, label_smoothing: float = 0.0) -> "Task":
        """The task with settings of ``ObjectiveConfig``.

        Raises:
            UsageError: A setting that it does not have.
        """

    @property
    def likelihood(self) -> str:
        """Density whose negative logarithm the loss is, for natural gradient."""

    def outputs(self, classes: int) -> int:
        """Number of a model's outputs, for data of so many classes."""

    def targets(self, labels: Tensor, shares: Tensor) -> Any:
        """Targets of a batch.

        Args:
            labels: (batch,), int64, before any mixing of images.
            shares: (batch, classes), float32: the share of each class in a mixed image.
        """

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """The mean loss over the batch, a scalar."""

    def right(self, outputs: Tensor, targets: Any) -> Tensor:
        """Marks of the outputs that count as right, (batch,), bool: what halting is to predict."""

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores of a split, among them ``loss`` and ``accuracy``, the share that is right.

        Args:
            outputs: (samples, outputs), float32, on the CPU.
            labels: (samples,), int64.
        """

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Order of scores: the epoch with the greatest is the best."""

    def decode(self, outputs: Tensor) -> list[Any]:
        """Predictions of a batch as values that JSON can hold."""


@runtime_checkable
class Pictured(Protocol):
    """A task with pictures of its own for a run folder."""

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw what a model gave for a split into a folder."""
