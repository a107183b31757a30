"""Plots of multi-label classification: scores of classes, curves, and the worst images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from smallfry.report.figure import in_legend, new_figure, plain, save, show_image, style

MOST_CLASSES = 40  # that are drawn, the worst ones
COLUMNS = 4
MOST_CURVES = 8


def class_bars(scores: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Draw average precision and F1 of the classes, the worst first.

    Args:
        scores: Of each class, with its number of ``images``.
        file: The PNG to write.
    """
    rows = sorted(scores.items(), key=lambda each: each[1]["average_precision"])[:MOST_CLASSES]
    with style():
        figure = new_figure(6.0, 1.2 + 0.28 * len(rows))
        axes = figure.subplots()
        places = torch.arange(len(rows)).double()
        for shift, name in ((-0.2, "average_precision"), (0.2, "f1")):
            values = [row[name] for _, row in rows]
            axes.barh((places + shift).tolist(), values, height=0.36, label=name.replace("_", " "))
        names = plain([name for name, _ in rows])
        axes.set_yticks(
            places.tolist(),
            [f"{name} ({int(row['images'])})" for name, (_, row) in zip(names, rows, strict=True)],
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # no bar is behind it
        save(figure, file)


def curves(
    probabilities: Tensor, labels: Tensor, scores: Mapping[str, Mapping[str, float]], file: Path
) -> None:
    """Draw precision against recall of the most frequent classes, with their thresholds.

    Args:
        probabilities: (images, classes).
        labels: (images, classes), 0 or 1.
        scores: Of each class, in the same order.
        file: The PNG to write.
    """
    names = list(scores)
    chosen = sorted(range(len(names)), key=lambda i: -scores[names[i]]["images"])[:MOST_CURVES]
    with style():
        figure = new_figure(5.5, 4.5)
        axes = figure.subplots()
        for i, title in zip(chosen, in_legend([names[i] for i in chosen]), strict=True):
            has = labels[:, i][probabilities[:, i].argsort(descending=True, stable=True)].double()
            hits = has.cumsum(0)
            recall = hits / max(1.0, has.sum().item())
            precision = hits / torch.arange(1, len(has) + 1)
            (line,) = axes.plot(recall.tolist(), precision.tolist(), label=title)
            row = scores[names[i]]
            axes.plot([row["recall"]], [row["precision"]], "o", color=line.get_color())
        axes.set_xlabel("recall")
        axes.set_ylabel("precision (dots: at the threshold)")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.legend(loc="lower left", fontsize=7)
        save(figure, file)


def worst_images(
    images: Tensor, chosen: Tensor, labels: Tensor, classes: Sequence[str], file: Path
) -> None:
    """Draw images with the classes that are missing (−) or too many (+).

    Args:
        images: (images, channels, height, width), uint8.
        chosen: Predicted classes (images, classes), bool.
        labels: True ones.
        classes: Names of the classes.
        file: The PNG to write.
    """
    rows = max(1, -(-len(images) // COLUMNS))
    with style():
        height, width = images.shape[-2:]
        figure = new_figure(1.9 * COLUMNS, (1.9 * height / width + 0.3) * rows)
        grid = figure.subplots(rows, COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, pixels, said, has in zip(grid.flat, images, chosen, labels, strict=False):
            axes.axis("on")
            show_image(axes, pixels)
            faults = [f"+{classes[i]}" for i in (said & ~has).nonzero()[:, 0].tolist()]
            faults += [f"−{classes[i]}" for i in (has & ~said).nonzero()[:, 0].tolist()]
            axes.set_title(plain([" ".join(faults)[:40] or "right"])[0], fontsize=7)
        save(figure, file)
