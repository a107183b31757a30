"""Multi-label classification: several classes per image, each with a threshold of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.tasks import register
from smallfry_runtime.decoders import require_no_settings

__all__ = ["MultiLabel", "best_thresholds"]

THRESHOLDS = "thresholds"  # entry of manifests
HALF = 0.5  # the threshold of a class that was not calibrated


class LabelTargets(NamedTuple):
    """Targets of a batch."""

    labels: Tensor  # (batch, classes), 0 or 1, before any mixing
    shares: Tensor  # (batch, classes), the probabilities to learn


@register
@dataclass(frozen=True)
class MultiLabel:
    """Classification of images with several classes, or none.

    The loss is the binary cross-entropy, summed over the classes: the negative logarithm of a
    Bernoulli likelihood.

    Args:
        label_smoothing: Share of the target that is spread over "has it" and "has it not".
        thresholds: Probability of each class from which an image has it; empty for 0.5 each.
    """

    name: ClassVar[str] = "multilabel"
    choices: ClassVar[tuple[str, ...]] = (
        *("mean_average_precision", "macro_f1", "micro_f1", "accuracy", "loss"),
    )
    likelihood: ClassVar[str] = "bernoulli"
    label_smoothing: float = 0.0
    thresholds: tuple[float, ...] = ()

    def outputs(self, classes: int) -> int:
        """Return the number of classes."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> LabelTargets:
        """Return labels for scores, and probabilities for the loss.

        Raises:
            UsageError: The data has one class for each image.
        """
        if labels.ndim != 2:
            raise UsageError(
                "the task multilabel needs data of several classes per image: a folder with "
                "data.several_labels true"
            )
        return LabelTargets(labels, shares)

    def loss(self, outputs: Tensor, targets: LabelTargets) -> Tensor:
        """Compute the binary cross-entropy, the mean over images of the sum over classes."""
        smooth = self.label_smoothing
        shares = targets.shares.to(outputs.dtype) * (1 - smooth) + smooth / 2
        total = F.binary_cross_entropy_with_logits(outputs, shares, reduction="sum")
        return total / len(outputs)

    def right(self, outputs: Tensor, targets: LabelTargets) -> Tensor:
        """Mark the images with exactly their classes, (batch,)."""
        return (self.chosen(outputs) == targets.labels.bool()).all(dim=1)

    def chosen(self, outputs: Tensor) -> Tensor:
        """Return the classes of images above their thresholds, (images, classes), bool."""
        cuts = self.thresholds or (HALF,) * outputs.shape[1]
        return outputs.sigmoid() >= torch.tensor(cuts, device=outputs.device, dtype=outputs.dtype)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute loss, share of exactly right images, mean average precision and F1 scores."""
        found = self.class_scores(outputs, labels, [str(i) for i in range(outputs.shape[1])])
        occurring = [row for row in found.values() if row["images"]]
        hits = (self.chosen(outputs) & labels.bool()).sum().item()
        total = self.chosen(outputs).sum().item() + labels.sum().item()

        def mean(name: str) -> float:
            return sum(row[name] for row in occurring) / max(1, len(occurring))

        return {
            "loss": self.loss(outputs, LabelTargets(labels, labels.float())).item(),
            "accuracy": self.right(outputs, LabelTargets(labels, labels)).double().mean().item(),
            "mean_average_precision": mean("average_precision"),
            "macro_f1": mean("f1"),
            "micro_f1": 2 * hits / total if total else 0.0,
        }

    def class_scores(
        self, outputs: Tensor, labels: Tensor, classes: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Compute the scores of each class; 0 for a class without images.

        Args:
            outputs: Logits (images, classes).
            labels: (images, classes), 0 or 1.
            classes: Names of the classes.
        """
        # it imports scipy and transformers, which takes seconds
        from torchmetrics.functional.classification import binary_average_precision

        said, has = self.chosen(outputs), labels.bool()
        cuts = self.thresholds or (HALF,) * len(classes)
        found = {}
        for i, name in enumerate(classes):
            hits, count = int((said[:, i] & has[:, i]).sum()), int(has[:, i].sum())
            taken = int(said[:, i].sum())
            average = 0.0
            if count:
                column = outputs[:, i].contiguous()  # whose high sigmoids are all 1
                shares = torch.searchsorted(column.sort().values, column).double() / len(column)
                average = binary_average_precision(shares, labels[:, i]).item()
            found[name] = {
                "images": count,
                "average_precision": average,
                "precision": hits / taken if taken else 0.0,
                "recall": hits / count if count else 0.0,
                "f1": 2 * hits / (taken + count) if taken + count else 0.0,
                "threshold": cuts[i],
            }
        return found

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by mean average precision, then by loss."""
        return scores["mean_average_precision"], -scores["loss"]

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Return the probability of each class, in their order.

        Raises:
            UsageError: There are settings, and it has none.
        """
        require_no_settings(settings)
        probabilities: list[Any] = outputs.sigmoid().tolist()
        return probabilities

    def calibrate(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the manifest's entries on thresholds with the best F1 score of each class."""
        return {THRESHOLDS: best_thresholds(outputs.sigmoid(), labels)}

    def calibrated(self, manifest: Mapping[str, Any]) -> "MultiLabel":
        """Return the task with the thresholds in a manifest, if it has any."""
        return replace(self, thresholds=tuple(manifest.get(THRESHOLDS, ())))

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the scores of classes, their precision and recall, and the worst images."""
        from smallfry.report.multilabel import class_bars, curves, worst_images

        rows = self.class_scores(outputs, split.labels, classes)
        class_bars(rows, folder / "classes.png")
        curves(outputs.sigmoid(), split.labels, rows, folder / "precision_recall.png")
        shares = split.labels.float()
        losses = F.binary_cross_entropy_with_logits(outputs, shares, reduction="none").sum(dim=1)
        worst = losses.argsort(descending=True, stable=True)[:16]
        shown = split.take(worst)
        said = self.chosen(outputs[worst])
        worst_images(shown.images, said, shown.labels.bool(), classes, folder / "mistakes.png")


def best_thresholds(probabilities: Tensor, labels: Tensor) -> list[float]:
    """Return the threshold of each class with the greatest F1 score.

    It lies half-way between two probabilities; 0.5 of a class without positive images.

    Args:
        probabilities: (images, classes).
        labels: (images, classes), 0 or 1.
    """
    found = []
    for share, has in zip(probabilities.double().T, labels.T, strict=True):
        count = int(has.sum())
        if count == 0:
            found.append(HALF)
            continue
        share, order = share.sort(descending=True, stable=True)
        hits = has[order].cumsum(0).double()
        taken = torch.arange(1, len(share) + 1, dtype=torch.float64)
        score = 2 * hits / (taken + count)
        below = torch.cat([share[1:], share.new_zeros(1)])
        score[share == below] = -1  # images of one probability are chosen together
        best = int(score.argmax())
        middle = ((share[best] + below[best]) / 2).to(probabilities)
        found.append((middle if middle > below[best] else share[best]).item())
    return found
