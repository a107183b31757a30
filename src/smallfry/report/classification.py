"""Plots of a classifier's errors: confusion matrix and most confident mistakes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from smallfry.report.confusion import count_confusions
from smallfry.report.figure import new_figure, plain, save, show_image, style

MOST_LABELLED = 40  # classes whose names still fit beside a matrix
MOST_DRAWN = 100  # classes whose whole matrix is drawn
WORST = 30  # classes that are drawn of more


def confusion_matrix(logits: Tensor, labels: Tensor, classes: Sequence[str], file: Path) -> None:
    """Draw the confusion matrix, with counts where there is room.

    Of more than 100 classes, the 30 with the most mistakes are drawn.

    Args:
        logits: (images, classes).
        labels: (images,).
        classes: Class names.
        file: The PNG to write.
    """
    found = count_confusions(logits.argmax(dim=1), labels, len(classes))
    if len(classes) <= MOST_DRAWN:
        chosen = torch.arange(len(classes))
        matrix, columns = found.dense(chosen)[:, :-1], []
    else:
        chosen = found.worst(WORST)
        matrix, columns = found.dense(chosen), ["all others"]
    names = plain([classes[i] for i in chosen.tolist()])
    count = len(names)
    share = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(14.0, max(5.0, 0.42 * count + 2.0))
    with style():
        figure = new_figure(side, side)
        axes = figure.subplots()
        axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        right = 1 - found.mistakes.sum().item() / max(1, len(labels))
        title = f"{right:.2%} of {len(labels):,} test images are right"
        if columns:
            title += f"\nthe {count} of {len(classes):,} classes with the most mistakes"
        axes.set_title(title)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if count <= MOST_LABELLED:
            columns = [*names, *columns]
            axes.set_xticks(range(len(columns)), columns, rotation=0 if _short(columns) else 90)
            axes.set_yticks(range(count), names)
        if count <= 20:
            for row, column in matrix.nonzero().tolist():
                shade = "white" if share[row, column] > 0.5 else "black"
                number = str(int(matrix[row, column]))
                axes.text(column, row, number, ha="center", va="center", color=shade, fontsize=8)
        save(figure, file)


def surest_mistakes(logits: Tensor, labels: Tensor, most: int = 18) -> Tensor:
    """Return the positions of the most confident mistakes, in descending order."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    return wrong[confidence[wrong].argsort(descending=True)][:most]


def mistakes(
    images: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str], file: Path
) -> None:
    """Draw misclassified images with their predicted classes.

    Args:
        images: (images, channels, size, size), uint8.
        logits: (images, classes).
        labels: (images,).
        classes: Class names.
        file: The PNG to write.
    """
    classes = plain(classes)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    columns = min(6, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))
    with style():
        figure = new_figure(max(4.0, 1.7 * columns), 2.0 * rows + 0.4)
        figure.suptitle("the surest mistakes" if len(images) else "no mistakes")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, i in zip(grid.flat, range(len(images)), strict=False):
            axes.axis("on")
            show_image(axes, images[i])
            said, true = classes[int(predicted[i])], classes[int(labels[i])]
            axes.set_title(f"{said} ({confidence[i]:.0%})\nis {true}", fontsize=8)
        save(figure, file)


def _short(classes: Sequence[str]) -> bool:
    return max(map(len, classes)) <= 2
