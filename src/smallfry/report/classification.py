"""What a classifier confuses: the confusion matrix, and its surest mistakes."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from smallfry.report.figure import new_figure, plain, save, show_image, style

MOST_LABELLED = 40  # classes whose names still fit beside a matrix


def confusion_matrix(logits: Tensor, labels: Tensor, classes: Sequence[str], file: Path) -> None:
    """Draw how often each class is taken for each, with counts where there is room.

    Args:
        logits: (images, classes).
        labels: (images,).
        classes: Class names.
        file: The PNG to write.
    """
    classes = plain(classes)
    count = len(classes)
    matrix = multiclass_confusion_matrix(logits, labels, count)
    share = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(14.0, max(5.0, 0.42 * count + 2.0))
    with style():
        figure = new_figure(side, side)
        axes = figure.subplots()
        axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        right = matrix.trace().item() / max(1, len(labels))
        axes.set_title(f"{right:.2%} of {len(labels):,} test images are right")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if count <= MOST_LABELLED:
            axes.set_xticks(range(count), classes, rotation=0 if _short(classes) else 90)
            axes.set_yticks(range(count), classes)
        if count <= 20:
            for row, column in matrix.nonzero().tolist():
                shade = "white" if share[row, column] > 0.5 else "black"
                number = str(int(matrix[row, column]))
                axes.text(column, row, number, ha="center", va="center", color=shade, fontsize=8)
        save(figure, file)


def surest_mistakes(logits: Tensor, labels: Tensor, most: int = 18) -> Tensor:
    """Positions of the wrongly classified images that the model is surest of, surest first."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    return wrong[confidence[wrong].argsort(descending=True)][:most]


def mistakes(
    images: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str], file: Path
) -> None:
    """Draw wrongly classified images, with what the model took them for.

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
