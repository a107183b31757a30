"""Sparse confusion matrix: only the pairs of classes with an image.

Of 10,000 classes there are 100 million pairs, and never more of them than there are images.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Confusions(NamedTuple):
    """Sparse confusion matrix."""

    true: Tensor  # (pairs,), int64 class indices
    predicted: Tensor  # (pairs,), int64 class indices
    counts: Tensor  # (pairs,), int64, how many images
    classes: int

    @property
    def mistakes(self) -> Tensor:
        """Number of misclassified images of each class, (classes,)."""
        wrong = self.true != self.predicted
        found = torch.zeros(self.classes, dtype=torch.int64)
        return found.index_add_(0, self.true[wrong], self.counts[wrong])

    def worst(self, most: int) -> Tensor:
        """Return at most ``most`` classes with the most mistakes, in descending order."""
        return self.mistakes.argsort(descending=True, stable=True)[:most]

    def dense(self, chosen: Tensor) -> Tensor:
        """Count the chosen classes, (chosen, chosen + 1); the last column is of all others."""
        place = torch.full((self.classes,), len(chosen))
        place[chosen] = torch.arange(len(chosen))
        rows, columns = place[self.true], place[self.predicted]
        matrix = torch.zeros(len(chosen) + 1, len(chosen) + 1, dtype=torch.int64)
        return matrix.index_put_((rows, columns), self.counts, accumulate=True)[:-1]


def count_confusions(predicted: Tensor, labels: Tensor, classes: int) -> Confusions:
    """Count predictions by class and predicted class.

    Args:
        predicted: (images,), int64 class indices.
        labels: (images,), int64 class indices.
        classes: Number of classes.
    """
    pairs, counts = torch.unique(labels * classes + predicted, return_counts=True)
    return Confusions(pairs // classes, pairs % classes, counts, classes)


def macro_f1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Compute the mean F1 score of all classes that occur, bit-identical to torchmetrics.

    Args:
        predicted: (images,), int64 class indices.
        labels: (images,), int64 class indices.
        classes: Number of classes.
    """
    right = torch.bincount(labels[predicted == labels], minlength=classes)
    said = torch.bincount(predicted, minlength=classes) + torch.bincount(labels, minlength=classes)
    occurs = (said > 0).float()
    scores = torch.where(said > 0, 2.0 * right / said.float(), 0.0)
    total = occurs.sum()
    return (occurs * scores / total).sum().item() if total > 0 else 0.0


def balanced_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Compute the mean recall of all classes that have images, as scikit-learn.

    Args:
        predicted: (images,), int64 class indices.
        labels: (images,), int64 class indices.
        classes: Number of classes.
    """
    right = torch.bincount(labels[predicted == labels], minlength=classes)
    count = torch.bincount(labels, minlength=classes)
    recall = right[count > 0] / count[count > 0].double()
    return recall.mean().item() if len(recall) else 0.0
