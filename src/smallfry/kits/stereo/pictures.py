"""Pictures of stereo: views, truth, exits and errors; and the exits' scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smallfry.data import Split
from smallfry.kits.stereo.metrics import full_disparity, full_labels
from smallfry.kits.stereo.models import FACTORS
from smallfry.kits.stereo.truth import Truth
from smallfry.report.figure import COLOURS, GREY, new_figure, save, show_image, style

__all__ = ["draw_exits", "draw_pairs"]

SHOWN = 4
FAR_OFF = 3.0  # pixels of error: the brightest


def draw_pairs(outputs: Any, split: Split, truth: Truth, file: Path) -> None:
    """Draw the pairs with the largest errors of the last exit.

    A row has the left view, the true disparity, that of each exit, its errors, with points that the
    right view doesn't see hatched, and true and chosen classes.

    Args:
        outputs: For the split.
        split: The views and labels.
        truth: Of the labels.
        file: The PNG to write.
    """
    factors = FACTORS[: len(outputs) // 3]
    last = factors[-1]
    error = (full_disparity(outputs[-2], last) - truth.disparity).abs()
    chosen = truth.known & ~truth.hidden
    mean = (error * chosen).sum(dim=(1, 2)) / chosen.sum(dim=(1, 2)).clamp(min=1)
    rows = mean.argsort(descending=True, stable=True)[:SHOWN]
    some = split.take(rows)
    columns = 5 + len(factors)
    height, width = truth.disparity.shape[1:]
    with style():
        figure = new_figure(1.9 * columns, (1.9 * height / width + 0.35) * max(1, len(rows)))
        axes = figure.subplots(max(1, len(rows)), columns, squeeze=False)
        for line, (row, views) in enumerate(zip(rows.tolist(), some.images, strict=True)):
            line_axes = axes[line]
            show_image(line_axes[0], views[:3])
            line_axes[0].set_title("left view", fontsize=8)
            top = max(1.0, float(truth.disparity[row].max()))
            _map(line_axes[1], truth.disparity[row], "true disparity", "viridis", top)
            for i, factor in enumerate(factors):
                found = full_disparity(outputs[3 * i + 1][row : row + 1], factor)[0]
                title = f"exit {i + 1}: {_mean(found, truth, row):.2f} px"
                _map(line_axes[2 + i], found, title, "viridis", top)
            wrong = torch.where(truth.known[row], error[row], torch.zeros_like(error[row]))
            _map(line_axes[-3], wrong, f"error, to {FAR_OFF:g} px", "magma", FAR_OFF)
            _hatch(line_axes[-3], truth.hidden[row])
            classes = outputs[-1].shape[1]
            _map(line_axes[-2], truth.labels[row], "true classes", "tab20", classes)
            named = full_labels(outputs[-1][row : row + 1], last)[0]
            _map(line_axes[-1], named, "chosen classes", "tab20", classes)
        save(figure, file)


def draw_exits(scores: Mapping[str, float], file: Path) -> None:
    """Draw the exits' disparity errors, before and after the refinement, and IoU of classes."""
    count = sum(name.startswith("miou_") for name in scores)
    exits = np.arange(1, count + 1)
    with style():
        figure = new_figure(7, 2.6)
        left, right = figure.subplots(1, 2)
        left.plot(exits, [scores[f"epe_{i}"] for i in exits], "o-", c=COLOURS[0], label="refined")
        plain = [scores[f"epe_plain_{i}"] for i in exits]
        left.plot(exits, plain, "o--", c=GREY, label="before refinement")
        left.set_title("mean error of disparities, px", fontsize=9)
        left.set_ylim(bottom=0)
        left.legend(fontsize=8)
        right.plot(exits, [scores[f"miou_{i}"] for i in exits], "o-", c=COLOURS[1])
        right.set_title("mean IoU of classes", fontsize=9)
        right.set_ylim(0, 1)
        for axes in (left, right):
            axes.set_xticks(exits)
            axes.set_xlabel("exit")
        save(figure, file)


def _mean(found: Tensor, truth: Truth, row: int) -> float:
    chosen = truth.known[row] & ~truth.hidden[row]
    return (found - truth.disparity[row]).abs()[chosen].mean().item() if chosen.any() else 0.0


def _map(axes: Any, values: Tensor, title: str, colours: str, most: float) -> None:
    axes.imshow(values.numpy(), cmap=colours, vmin=0, vmax=most, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def _hatch(axes: Any, hidden: Tensor) -> None:
    if hidden.any():
        marked = hidden.numpy().astype(float)
        axes.contourf(marked, levels=[0.5, 1.5], colors="none", hatches=["//////"])
