"""Pictures of a search: best so far, accuracy against arithmetic, importance of choices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smallfry.report.axes import log_axis
from smallfry.report.figure import COLOURS, GREY, new_figure, plain, save, style

ROOM = 1.1  # beside the outermost points


class Point(NamedTuple):
    """Evaluated candidate."""

    accuracy: float  # percent of the validation images
    macs: float
    chosen: bool = False


def draw_search(
    found: Mapping[str, Sequence[Point]],
    importances: Mapping[str, float],
    file: Path,
    measure: str = "validation accuracy",
    predicted: Sequence[tuple[float, float]] = (),
) -> None:
    """Draw a search in three panels, and a fourth if its strategy predicts.

    Args:
        found: Points of each strategy in the order of evaluation, that of the search first.
        importances: Share of the variance by choice.
        file: The PNG to write.
        measure: What the points' values are, in percent.
        predicted: Predicted and measured value of the candidates that have both.
    """
    with style():
        count = 4 if len(predicted) > 1 else 3
        figure = new_figure(4.35 * count, 4.4)
        best, front, shares, *others = figure.subplots(1, count)
        for (label, points), colour in zip(found.items(), (COLOURS[0], GREY), strict=False):
            accuracies = [point.accuracy for point in points]
            numbers = range(1, len(points) + 1)
            best.plot(numbers, accuracies, ".", color=colour, alpha=0.35)
            best.step(
                numbers, np.maximum.accumulate(accuracies), where="post", color=colour, label=label
            )
            front.scatter([p.macs / 1e6 for p in points], accuracies, s=16, color=colour, alpha=0.6)
        _draw_front(front, [point for points in found.values() for point in points])
        _draw_shares(shares, importances, measure)
        best.set(xlabel="candidates", ylabel=f"{measure}, %", title="best so far")
        front.set(xlabel="MMAC", title=f"{measure} and arithmetic")
        best.legend(loc="lower right")
        for axes in others:
            _draw_predicted(axes, predicted, measure)
        save(figure, file)


def _draw_front(axes: Any, points: Sequence[Point]) -> None:
    shown = pareto(points)
    places = [point.macs / 1e6 for point in points]
    axes.step(
        [p.macs / 1e6 for p in shown],
        [p.accuracy for p in shown],
        where="post",
        color=COLOURS[1],
        linewidth=1,
        label="front of all",
    )
    axes.legend(loc="lower right")
    for point in (p for p in points if p.chosen):
        axes.scatter(
            [point.macs / 1e6], [point.accuracy], s=190, facecolors="none", edgecolors=COLOURS[4]
        )
    log_axis(axes, "x", min(places) / ROOM, max(places) * ROOM)


def _draw_shares(axes: Any, importances: Mapping[str, float], measure: str) -> None:
    order = sorted(importances, key=lambda name: importances[name])
    axes.barh(plain(order), [100 * importances[name] for name in order], color=COLOURS[0])
    axes.set_axisbelow(True)
    axes.set(xlabel=f"% of the variance of {measure}", title="importance of choices")


def _draw_predicted(axes: Any, predicted: Sequence[tuple[float, float]], measure: str) -> None:
    """Draw what was predicted against what was measured, in the order of measurement."""
    values = np.array(predicted)
    ends = values.min(), values.max()
    axes.plot(ends, ends, color=GREY, linewidth=1, label="equal")
    axes.scatter(values[:, 0], values[:, 1], s=16, c=np.arange(len(values)), cmap="viridis")
    axes.set(
        xlabel="predicted before the measurement, %",
        ylabel="measured, %",
        title=f"{measure}, later ones lighter",
    )
    axes.legend(loc="lower right")


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no cheaper one equals in accuracy, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.macs, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front
