"""Classification: class logits, cross-entropy, and the usual scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.data import Split
from smallfry.report.confusion import balanced_accuracy, macro_f1
from smallfry.tasks import register
from smallfry_runtime.decoders import require_no_settings

__all__ = ["ClassTargets", "Classification"]

TOP = 5  # most probable classes that ``top_5_accuracy`` looks at


class ClassTargets(NamedTuple):
    """Class targets of a batch."""

    labels: Tensor  # (batch,), int64, before any mixing
    shares: Tensor  # (batch, classes), the class probabilities to learn


@register
@dataclass(frozen=True)
class Classification:
    """Single-label classification.

    Args:
        label_smoothing: Share of the target spread over all classes.
        weights: Weight of each class in the loss; none if all have the same.
    """

    name: ClassVar[str] = "classification"
    choices: ClassVar[tuple[str, ...]] = (
        *("accuracy", "balanced_accuracy", "macro_f1", "loss", "calibration_error"),
    )
    likelihood: ClassVar[str] = "categorical"
    label_smoothing: float = 0.0
    weights: tuple[float, ...] = ()

    def outputs(self, classes: int) -> int:
        """Return the number of classes."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> ClassTargets:
        """Return labels for scores, and class probabilities for the loss."""
        return ClassTargets(labels, shares)

    def loss(self, outputs: Tensor, targets: ClassTargets) -> Tensor:
        """Compute the mean cross-entropy, weighted by class."""
        return self.losses(outputs, targets, "mean")

    def losses(self, outputs: Tensor, targets: ClassTargets, reduction: str = "none") -> Tensor:
        """Compute the cross-entropy of each image, (batch,), weighted by class."""
        weights = _on_device(self.weights, outputs.device, outputs.dtype) if self.weights else None
        return F.cross_entropy(
            outputs,
            targets.shares,
            weights,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
        )

    def right(self, outputs: Tensor, targets: ClassTargets) -> Tensor:
        """Mark the images whose most probable class is the unmixed label."""
        return outputs.argmax(dim=1) == targets.labels

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute loss, accuracies, macro F1 and calibration error."""
        # it imports scipy and transformers, which takes seconds
        from torchmetrics.functional.classification import (
            multiclass_accuracy,
            multiclass_calibration_error,
        )

        classes, predicted = outputs.shape[1], outputs.argmax(dim=1)
        probabilities = outputs.softmax(dim=1)
        return {
            "loss": F.cross_entropy(outputs, labels).item(),
            "accuracy": multiclass_accuracy(outputs, labels, classes, average="micro").item(),
            "macro_f1": macro_f1(predicted, labels, classes),
            **_top_k(outputs, labels),
            "balanced_accuracy": balanced_accuracy(predicted, labels, classes),
            "calibration_error": multiclass_calibration_error(
                probabilities, labels, classes
            ).item(),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by accuracy, then by loss."""
        return scores["accuracy"], -scores["loss"]

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Return the probability of each class, in their order.

        Raises:
            UsageError: There are settings, and it has none.
        """
        require_no_settings(settings)
        probabilities: list[Any] = outputs.softmax(dim=1).tolist()
        return probabilities

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the confusion matrix, reliability and the most confident mistakes."""
        from smallfry.report.classification import confusion_matrix, mistakes, surest_mistakes
        from smallfry.report.per_class import reliability_diagram

        labels = split.labels
        reliability_diagram(outputs, labels, folder / "reliability.png")
        confusion_matrix(outputs, labels, classes, folder / "confusion_matrix.png")
        wrong = surest_mistakes(outputs, labels)
        shown = split.take(wrong).images
        mistakes(shown, outputs[wrong], labels[wrong], classes, folder / "mistakes.png")


def _top_k(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the share of images with the label among the 5 most probable of more classes."""
    if outputs.shape[1] <= TOP:
        return {}
    found = (outputs.topk(TOP, dim=1).indices == labels[:, None]).any(dim=1)
    return {"top_5_accuracy": found.double().mean().item()}


@lru_cache(maxsize=8)
def _on_device(weights: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the weights of classes as a tensor, which is made once."""
    return torch.tensor(weights, device=device, dtype=dtype)
