"""Scores of each class, reliability of probabilities, and their plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smallfry.io.csv_text import csv_text
from smallfry.report.confusion import count_confusions
from smallfry.report.figure import COLOURS, GREY, new_figure, save, style

BINS = 15  # of confidence
MOST_COLUMNS = 1000  # classes of a confusion matrix; of more, its pairs are listed


class ClassScores(NamedTuple):
    """Scores of one class."""

    name: str
    precision: float  # 0 if it was never predicted
    recall: float  # 0 if it has no images
    f1: float
    images: int


def class_scores(
    outputs: Tensor, labels: Tensor, classes: Sequence[str]
) -> tuple[ClassScores, ...]:
    """Compute precision, recall and F1 score of each class.

    Args:
        outputs: (images, classes).
        labels: (images,).
        classes: Class names.
    """
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(
        labels.numpy(),
        outputs.argmax(dim=1).numpy(),
        labels=np.arange(len(classes)),
        zero_division=0.0,
    )
    precision, recall, f1, images = (column.tolist() for column in found)
    rows = zip(classes, precision, recall, f1, map(int, images), strict=True)
    return tuple(ClassScores(*row) for row in rows)


def scores_dict(scores: Sequence[ClassScores]) -> dict[str, dict[str, Any]]:
    """Return the scores by class name, for JSON."""
    return {each.name: {k: v for k, v in each._asdict().items() if k != "name"} for each in scores}


class Reliability(NamedTuple):
    """Confidence and accuracy of predictions in equal bins of confidence."""

    confidence: Tensor  # (bins,), mean of the predictions; 0 of an empty bin
    accuracy: Tensor  # (bins,), share of right predictions
    counts: Tensor  # (bins,), int64, predictions

    @property
    def error(self) -> float:
        """Expected calibration error: the mean difference of confidence and accuracy."""
        gaps = (self.confidence - self.accuracy).abs() * self.counts
        return (gaps.sum() / self.counts.sum().clamp(min=1)).item()


def reliability(outputs: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Compute the reliability of the most probable classes.

    Args:
        outputs: Logits (images, classes).
        labels: (images,).
        bins: Number of bins.
    """
    confidence, predicted = outputs.softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, bins + 1)
    place = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [
        torch.bincount(place, each.double(), minlength=bins)
        for each in (confidence, predicted == labels)
    ]
    mean, accuracy = (each / counts.clamp(min=1) for each in sums)
    return Reliability(mean, accuracy, counts)


def reliability_diagram(outputs: Tensor, labels: Tensor, file: Path) -> None:
    """Draw accuracy against confidence, and the number of predictions below; as ``reliability``."""
    found = reliability(outputs, labels)
    bins = len(found.counts)
    middle, width = (torch.arange(bins) + 0.5) / bins, 1 / bins
    filled = found.counts > 0
    with style():
        figure = new_figure(5.0, 5.6)
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
        heights = found.accuracy[filled].numpy()
        axes.bar(middle[filled].numpy(), heights, 0.94 * width, color=COLOURS[0], label="accuracy")
        confidence = found.confidence[filled].numpy()
        axes.plot(
            confidence, heights, "o", color=COLOURS[1], label="mean confidence", clip_on=False
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        axes.set_title(f"expected calibration error {found.error:.4f}, {len(labels):,} images")
        axes.legend(loc="upper left")
        below.bar(middle.numpy(), found.counts.numpy(), 0.94 * width, color=GREY)
        below.set(xlabel="confidence", ylabel="images")
        save(figure, file)


def scores_csv(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the scores of classes, by name, as CSV."""
    names = [*next(iter(scores.values()))]
    rows = [(each, *(row[name] for name in names)) for each, row in scores.items()]
    return csv_text([("class", *names), *rows])


def confusion_csv(outputs: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """Format the confusion matrix as CSV: a row for each true class, a column for each predicted.

    Of more than 1,000 classes it lists the pairs that occur: true, predicted, images.
    """
    found = count_confusions(outputs.argmax(dim=1), labels, len(classes))
    if len(classes) > MOST_COLUMNS:
        pairs = zip(found.true.tolist(), found.predicted.tolist(), strict=True)
        named = [(classes[true], classes[predicted]) for true, predicted in pairs]
        rows = [(*pair, n) for pair, n in zip(named, found.counts.tolist(), strict=True)]
        return csv_text([("true", "predicted", "images"), *rows])
    matrix = found.dense(torch.arange(len(classes)))[:, :-1].tolist()
    rows = [(name, *row) for name, row in zip(classes, matrix, strict=True)]
    return csv_text([("true \\ predicted", *classes), *rows])
