"""Pictures of place recognition: scores, curves, receptive fields and hyperactive neurons."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry.kits.places.modules import ModularSNN
from smallfry.kits.places.scores import precision_recall, recall_at
from smallfry.report.figure import COLOURS, GREY, new_figure, save, style

__all__ = ["draw_activity", "draw_curves", "draw_fields", "draw_recalls", "draw_scores"]

FIELDS = 8  # neurons a module
MODULES = 6


def draw_scores(scores: NDArray[np.float64], truth: NDArray[np.int64], file: Path) -> None:
    """Draw scores (queries, places) as a matrix, with the true places as dots.

    Args:
        scores: (queries, places).
        truth: (queries,).
        file: The PNG to write.
    """
    with style():
        figure = new_figure(6, 5)
        axes = figure.subplots()
        axes.imshow(scores, aspect="auto", cmap="Blues", interpolation="nearest")
        axes.scatter(truth, np.arange(len(truth)), s=6, color=COLOURS[1], label="true place")
        axes.set_title(f"recall@1 {recall_at(scores, truth):.1%} of {len(truth):,} queries")
        axes.set_xlabel("place")
        axes.set_ylabel("query")
        axes.grid(False)
        save(figure, file)


def draw_curves(
    methods: Mapping[str, NDArray[np.float64]], truth: NDArray[np.int64], file: Path
) -> None:
    """Draw precision over recall, and recall over the number of places that are looked at.

    Args:
        methods: Scores (queries, places) by the name of the method.
        truth: (queries,).
        file: The PNG to write.
    """
    with style():
        figure = new_figure(9, 3.6)
        left, right = figure.subplots(1, 2)
        for (name, scores), colour in zip(methods.items(), COLOURS * len(methods), strict=False):
            curve = precision_recall(scores, truth)
            label = f"{name}, area {curve.area:.3f}"
            left.step(curve.recall, curve.precision, where="pre", color=colour, label=label)
            counts = np.arange(1, min(20, scores.shape[1]) + 1)
            recalls = [recall_at(scores, truth, int(count)) for count in counts]
            right.plot(counts, recalls, color=colour)
        left.set_xlabel("recall")
        left.set_ylabel("precision")
        left.legend(loc="lower left")
        right.set_xlabel("places that are looked at")
        right.set_ylabel("recall")
        for axes in (left, right):
            axes.set_ylim(0, 1.02)
        save(figure, file)


def draw_recalls(recalls: Mapping[int, float], chosen: int, file: Path) -> None:
    """Draw recall over the threshold of hyperactive neurons, and the chosen one.

    Args:
        recalls: Recall@1 by threshold; 0 is off.
        chosen: The threshold that was chosen.
        file: The PNG to write.
    """
    with style():
        figure = new_figure(5.5, 3.4)
        axes = figure.subplots()
        on = sorted(threshold for threshold in recalls if threshold)
        axes.plot(on, [recalls[t] for t in on], marker="o", color=COLOURS[0])
        if 0 in recalls:
            axes.axhline(recalls[0], color=GREY, linestyle="--", label="none silenced")
            axes.legend()
        if chosen:
            axes.axvline(chosen, color=COLOURS[1])
        axes.set_xlabel("images from which a neuron is hyperactive")
        axes.set_ylabel("calibration recall@1")
        save(figure, file)


def draw_fields(modules: ModularSNN, file: Path) -> None:
    """Draw the input weights of the first neurons of the first modules as images."""
    rows, columns = min(MODULES, len(modules.weights)), min(FIELDS, modules.weights.shape[2])
    with style():
        figure = new_figure(1.1 * columns, 1.2 * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        for m in range(rows):
            for n in range(columns):
                field = modules.weights[m, :, n].reshape(modules.settings.side, -1)
                axes[m, n].imshow(field, cmap="gray")
                place = modules.assignment[m, n]
                title = f"place {place}" if place >= 0 else "none"
                _bare(axes[m, n], title)
        save(figure, file)


def draw_activity(modules: ModularSNN, file: Path) -> None:
    """Draw how many neurons answer to how many images, and the threshold."""
    with style():
        figure = new_figure(5.5, 3.4)
        axes = figure.subplots()
        axes.hist(modules.activity.ravel(), bins=30, color=COLOURS[0])
        if modules.threshold:
            axes.axvline(modules.threshold, color=COLOURS[1], label="silenced from here")
            axes.legend()
        axes.set_xlabel(f"images of {modules.places:,} that a neuron answers to")
        axes.set_ylabel("neurons")
        axes.set_title(f"{int(modules.silenced.sum()):,} of {modules.activity.size:,} silenced")
        save(figure, file)


def _bare(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()
