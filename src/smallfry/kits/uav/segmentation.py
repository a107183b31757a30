"""Masks of floor and obstacles: cross-entropy with soft Dice, and mean intersection over union.

    loss = mean over pixels of −log p(label) + 1 − mean over classes of
           (2 Σ p y + 1) / (Σ p + Σ y + 1)

with sums over the pixels of an image; Milletari et al. 2016, arXiv 1606.04797, have the Dice loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults
from smallfry_runtime.decoders import uav_segmentation as decoder

__all__ = ["UAVSegmentation", "confusion", "intersection_over_union", "soft_dice"]

RIGHT = 0.95  # share of pixels of an image that is right
SHOWN = 8  # images of a picture
# settings of augmentation that leave every pixel where it is
AUGMENTATIONS = frozenset({"color_jitter", "cutout", "erasing", "repeats"})


@register
@dataclass(frozen=True)
class UAVSegmentation:
    """Masks: logits (images, classes, height, width), labels (images, height, width).

    An image is right with 95 % of its pixels. For natural gradient the loss is taken for its
    cross-entropy, a likelihood of each pixel; Dice has none.
    """

    name: ClassVar[str] = "uav-segmentation"
    likelihood: ClassVar[str] = "categorical_mean"
    adds_terms: ClassVar[bool] = True
    choices: ClassVar[tuple[str, ...]] = ("mean_iou", "pixel_accuracy", "accuracy", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "unet_xs", "cross_entropy")
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe_segmentation.yaml"
    augmentations: ClassVar[frozenset[str]] = AUGMENTATIONS

    def outputs(self, classes: int) -> int:
        """Return the number of classes."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the labels (images, height, width).

        Raises:
            UsageError: The data has one label for an image, not one for each pixel.
        """
        if labels.ndim != 3:
            raise UsageError(
                "the task uav-segmentation needs images with a class for each pixel: name "
                "generated views (--data uav-rooms)"
            )
        return labels

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of each image, (images,).

        Raises:
            UsageError: The model has no logits for each pixel.
        """
        if outputs.ndim != 4 or outputs.shape[2:] != targets.shape[1:]:
            raise UsageError(
                "the task uav-segmentation needs a model with logits for each pixel, such as "
                f"unet_xs; this one's outputs are {tuple(outputs.shape)}"
            )
        logits = outputs.float()
        return F.cross_entropy(logits, targets, reduction="none").mean(dim=(1, 2)) + (
            1 - soft_dice(logits, targets)
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean loss over the images of a batch."""
        return self.losses(outputs, targets).mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mark the images with 95 % of their pixels right, (images,)."""
        return _hits(outputs, targets) >= RIGHT

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute loss, mean IoU over the split, share of right pixels, and of right images."""
        hits = _hits(outputs, labels)
        return {
            "loss": self.loss(outputs, labels).item(),
            "accuracy": (hits >= RIGHT).double().mean().item(),
            "pixel_accuracy": hits.double().mean().item(),
            "mean_iou": _mean_iou(outputs, labels),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by mean IoU, then by loss."""
        return scores["mean_iou"], -scores["loss"]

    def class_scores(
        self, outputs: Tensor, labels: Tensor, classes: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Compute IoU, precision, recall and F1 score (Dice) of each class over all pixels.

        A class that is nowhere has zeros.
        """
        table = confusion(outputs.argmax(dim=1), labels, len(classes)).double()
        hits, true, said = table.diagonal(), table.sum(dim=1), table.sum(dim=0)
        columns = {
            "iou": hits / (true + said - hits).clamp(min=1),
            "precision": hits / said.clamp(min=1),
            "recall": hits / true.clamp(min=1),
            "f1": 2 * hits / (true + said).clamp(min=1),
        }
        return {
            name: {
                "images": int((labels == i).flatten(1).any(dim=1).sum()),
                **{kind: column[i].item() for kind, column in columns.items()},
            }
            for i, name in enumerate(classes)
        }

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode masks; settings are ``smallfry_runtime.decoders.uav_segmentation.Settings``."""
        return decoder.decode(np.asarray(outputs.detach().float().cpu()), classes, settings)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the worst images with their labels and masks."""
        from smallfry.kits.uav.pictures import draw_masks

        worst = self.losses(outputs, split.labels).argsort(descending=True, stable=True)[:SHOWN]
        shown = split.take(worst)
        found = outputs[worst].argmax(dim=1)
        draw_masks(shown.images, {"labels": shown.labels, "student": found}, folder / "masks.png")


def soft_dice(outputs: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean soft Dice coefficient over the classes of each image, (images,).

    Args:
        outputs: Logits (images, classes, height, width).
        labels: Classes (images, height, width).
    """
    shares = outputs.softmax(dim=1)
    truth = F.one_hot(labels, outputs.shape[1]).permute(0, 3, 1, 2).to(shares.dtype)
    both = (shares * truth).sum(dim=(2, 3))
    sizes = shares.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
    return ((2 * both + 1) / (sizes + 1)).mean(dim=1)


def confusion(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count pixels by label and found class, (classes, classes)."""
    pairs = labels.flatten() * classes + found.flatten()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def intersection_over_union(table: Tensor) -> Tensor:
    """Compute the intersection over union of each class; nan of one that is nowhere.

    Args:
        table: Pixels by label and found class, (classes, classes).
    """
    hits = table.diagonal().double()
    return hits / (table.sum(dim=0) + table.sum(dim=1) - hits)


def _mean_iou(outputs: Tensor, labels: Tensor) -> float:
    table = confusion(outputs.argmax(dim=1), labels, outputs.shape[1])
    return intersection_over_union(table).nanmean().item()


def _hits(outputs: Tensor, labels: Tensor) -> Tensor:
    """Compute the share of right pixels of each image, (images,)."""
    return (outputs.argmax(dim=1) == labels).float().mean(dim=(1, 2))
