"""Classification: class logits, cross-entropy, and the usual scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from smallfry.data import Split
from smallfry.report.confusion import macro_f1
from smallfry.tasks import register
from smallfry.tasks.scores import accuracy, calibration_error

__all__ = ["ClassTargets", "Classification"]


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
    """

    name: ClassVar[str] = "classification"
    likelihood: ClassVar[str] = "categorical"
    label_smoothing: float = 0.0

    @classmethod
    def create(cls, label_smoothing: float = 0.0) -> "Classification":
        """Create the task from ``ObjectiveConfig``."""
        return cls(label_smoothing)

    def outputs(self, classes: int) -> int:
        """Return the number of classes."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> ClassTargets:
        """Return labels for scores, and class probabilities for the loss."""
        return ClassTargets(labels, shares)

    def loss(self, outputs: Tensor, targets: ClassTargets) -> Tensor:
        """Compute the mean cross-entropy."""
        return F.cross_entropy(outputs, targets.shares, label_smoothing=self.label_smoothing)

    def right(self, outputs: Tensor, targets: ClassTargets) -> Tensor:
        """Mark the images whose most probable class is the unmixed label."""
        return outputs.argmax(dim=1) == targets.labels

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute loss, accuracy, macro F1 and calibration error."""
        classes = outputs.shape[1]
        predicted = outputs.argmax(dim=1)
        return {
            "loss": F.cross_entropy(outputs, labels).item(),
            "accuracy": accuracy(predicted, labels),
            "macro_f1": macro_f1(predicted, labels, classes),
            "calibration_error": calibration_error(outputs.softmax(dim=1), labels),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by accuracy, then by loss."""
        return scores["accuracy"], -scores["loss"]

    def decode(self, outputs: Tensor) -> list[Any]:
        """Return the probability of each class."""
        probabilities: list[Any] = outputs.softmax(dim=1).tolist()
        return probabilities

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the confusion matrix and the most confident mistakes."""
        from smallfry.report.classification import confusion_matrix, mistakes, surest_mistakes

        labels = split.labels
        confusion_matrix(outputs, labels, classes, folder / "confusion_matrix.png")
        wrong = surest_mistakes(outputs, labels)
        shown = split.take(wrong).images
        mistakes(shown, outputs[wrong], labels[wrong], classes, folder / "mistakes.png")
