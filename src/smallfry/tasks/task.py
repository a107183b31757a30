"""Task interface: targets, loss, likelihood, scores and decoding of a model's outputs.

The training loop, its objectives and the evaluation use a task only through this contract.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from smallfry.data import ImageData, Split
from smallfry.models.contract import map_tensors

__all__ = [
    "AddsTerms",
    "Batch",
    "Calibrated",
    "Explained",
    "FitsItself",
    "Fitted",
    "HasChoices",
    "HasDefaults",
    "HasRecipe",
    "Judges",
    "LimitsAugmentation",
    "Pictured",
    "ReadsText",
    "ScoredByClass",
    "ScoredByStep",
    "Task",
    "TaskDefaults",
    "count_judged",
    "micro_batch_sizes",
    "share_of",
]


class Batch(NamedTuple):
    """Inputs with their targets, which are opaque outside the task.

    Both are tensors whose first dimension is the batch, in tuples, lists or dictionaries.
    """

    inputs: Tensor  # (batch, channels, height, width), normalised
    targets: Any

    def split(self, parts: int) -> list["Batch"]:
        """Split the batch into non-empty micro-batches."""
        sizes = micro_batch_sizes(len(self.inputs), parts)
        ends = [*accumulate(sizes)]
        return [
            map_tensors(itemgetter(slice(end - size, end)), self)
            for size, end in zip(sizes, ends, strict=True)
        ]

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to another device."""
        moved: Batch = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), self)
        return moved


def micro_batch_sizes(images: int, parts: int) -> list[int]:
    """Return the sizes of a batch's micro-batches: all equal but the last, with the remainder."""
    size = -(-images // parts)
    return [min(size, images - start) for start in range(0, images, size)]


class Task(Protocol):
    """Meaning of a model's outputs.

    Outputs are a tensor whose first dimension is the batch, or a named tuple of such tensors, whose
    fields become the outputs of an export. Without PyTorch they are arrays, or a dictionary of
    arrays by the names of the fields. A task is a frozen dataclass with defaults, registered
    with ``tasks.register``; one with a field ``label_smoothing`` is given that of the run.
    """

    name: ClassVar[str]

    @property
    def likelihood(self) -> str | dict[str, Any]:
        """Density whose negative logarithm is the loss, for natural gradient; by output's name."""

    def outputs(self, classes: int) -> int:
        """Return the number of model outputs for a number of classes."""

    def targets(self, labels: Tensor, shares: Tensor) -> Any:
        """Extract the targets of a batch.

        Args:
            labels: (batch,), int64, before any mixing of images; of other tasks (batch, …).
            shares: (batch, classes), float32: the share of each class in a mixed image; the
                labels where they are no classes.
        """

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the mean loss over the batch, a scalar."""

    def right(self, outputs: Any, targets: Any) -> Tensor:
        """Mark correct outputs, (batch,), bool: the target of halting.

        A sample with nothing to be right about, such as a puzzle without a labelled cell, is not;
        see ``Judges``.
        """

    def metrics(self, outputs: Any, labels: Tensor) -> dict[str, float]:
        """Score a split; includes ``loss`` and ``accuracy``, the share of correct outputs.

        Args:
            outputs: (samples, outputs), float32, on the CPU.
            labels: (samples,), int64; of other tasks (samples, …).
        """

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Return a sort key of scores: the epoch with the greatest is the best."""

    def decode(
        self, outputs: Any, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode the outputs for a batch to values that JSON can hold.

        Settings are the task's own, such as the width of a search; most tasks have none. Exports
        are decoded by ``smallfry_runtime.decoders``, without PyTorch: a task that has a module
        there calls it.
        """


@runtime_checkable
class Judges(Protocol):
    """Task with samples that may have nothing to be right about, which no accuracy counts."""

    def judged(self, targets: Any) -> Tensor:
        """Mark the samples with something to be right about, (batch,), bool."""


def count_judged(task: Task, targets: Any, right: Tensor) -> Tensor:
    """Count the samples of a batch that an accuracy counts, a scalar.

    Args:
        task: Their task.
        targets: Their targets.
        right: What it marked, (batch,).
    """
    marked = task.judged(targets) if isinstance(task, Judges) else torch.ones_like(right)
    return marked.sum()


def share_of(right: Tensor, judged: Tensor) -> float:
    """Compute the share of right ones of what is judged; 0 of nothing.

    Args:
        right: Of any shape, bool.
        judged: The same.

    Example:
        >>> share_of(torch.tensor([True, False, False]), torch.tensor([True, True, False]))
        0.5
    """
    return (right & judged).sum().item() / max(1, int(judged.sum()))


@runtime_checkable
class LimitsAugmentation(Protocol):
    """Task whose labels do not hold for each augmented image, such as maps of a flipped one."""

    augmentations: ClassVar[frozenset[str]]  # settings of ``AugmentConfig`` that may be given


@runtime_checkable
class AddsTerms(Protocol):
    """Task with terms of the loss beside the likelihood, such as Dice.

    Natural gradient then takes the likelihood for the whole, without comparing it with gradients.
    """

    adds_terms: ClassVar[bool]


@runtime_checkable
class HasFisher(Protocol):
    """Task whose likelihood is not that of its outputs one by one, such as of a text's frames.

    Natural gradient then takes this Fisher matrix, unless its options name another.
    """

    fisher: ClassVar[str]


@runtime_checkable
class HasChoices(Protocol):
    """Task with a choice of scores for the best epoch.

    The lower the better of names that end in ``loss`` or ``error``, otherwise the higher.
    """

    choices: ClassVar[tuple[str, ...]]


@runtime_checkable
class Calibrated(Protocol):
    """Task whose answers depend on thresholds, which are in a model's manifest."""

    def calibrate(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return entries of the manifest from the outputs for validation images."""

    def calibrated(self, manifest: Mapping[str, Any]) -> Task:
        """Return the task with the thresholds in a manifest."""


@runtime_checkable
class ScoredByClass(Protocol):
    """Task with scores of single classes."""

    def class_scores(
        self, outputs: Tensor, labels: Tensor, classes: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Return the scores of each class by its name."""


@runtime_checkable
class Pictured(Protocol):
    """Task with plots of its own for a run folder."""

    def draw(self, outputs: Any, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the outputs for a split into a folder."""


@runtime_checkable
class Explained(Protocol):
    """Task with plots for a run folder."""

    def explain(
        self,
        model: nn.Module,
        split: Split,
        normalize: Callable[[Tensor], Tensor],
        classes: Sequence[str],
        folder: Path,
    ) -> None:
        """Draw explanations of a model's answers to a split into a folder."""


class Fitted(NamedTuple):
    """Result of a task's own fitting."""

    facts: Mapping[str, Any]  # plain data for the summary
    references: Sequence[Mapping[str, Any]]  # baselines: ``name`` and ``test_accuracy`` each
    notes: Sequence[str] = ()  # sentences for the user


@runtime_checkable
class FitsItself(Protocol):
    """Task with models fitted by itself, without gradients."""

    def fit(self, model: nn.Module, data: ImageData) -> Fitted:
        """Fit a model in place to the training split; it may calibrate on the validation split.

        Raises:
            UsageError: A model or data that it can't fit.
        """


class TaskDefaults(NamedTuple):
    """Model and objective of a task for ``auto`` in a configuration."""

    models: Mapping[int, str]  # by the side of the images
    model: str  # of images of any other side
    objective: str


@runtime_checkable
class HasDefaults(Protocol):
    """Task with a model and an objective of its own."""

    defaults: ClassVar[TaskDefaults]


@runtime_checkable
class HasRecipe(Protocol):
    """Task with a recipe: the settings of a run that names the task alone."""

    recipe: ClassVar[Path]


@runtime_checkable
class ReadsText(Protocol):
    """Task with inputs from text files."""

    def read(self, text: str, classes: Sequence[str], side: int) -> Tensor:
        """Read the inputs of a file, (inputs, channels, side, side), uint8.

        Raises:
            DataError: Text of another form.
        """


@runtime_checkable
class ScoredByStep(Protocol):
    """Task scored at every recursion step."""

    scored_by_step: ClassVar[bool]
