"""Plots of training studies; reported figures are hollow and dashed, measured ones filled."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from smallfry.report.axes import log_axis
from smallfry.report.figure import COLOURS, GREY, new_figure, save, style
from smallfry.report.table import number

PALETTE = (*COLOURS, "#0891b2", "#ca8a04", "#db2777", "#84cc16", "#7c2d12", "#c084fc", "#0f766e")
MARKERS = ("o", "s", "^", "D")  # for labels beyond the colours
HOLLOW: Mapping[str, Any] = {
    "markerfacecolor": "white",
    "linestyle": (0, (4, 2)),
    "linewidth": 1.1,
}
PER_ROW = 3  # panels
MOST_MARKED = 12  # points of a line that are still marked
ACCURACY = "test accuracy, %"


class Series(NamedTuple):
    """Points of one kind, sorted by x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    reported: bool = False
    error: Sequence[float | None] = ()  # ± in y


class Panel(NamedTuple):
    """One axes of a picture."""

    title: str
    x: str
    series: Sequence[Series]
    y: str = ACCURACY
    log: bool = True
    ticks: Sequence[float] = ()
    joined: bool = True  # a line through the points of a series


def draw_panels(panels: Sequence[Panel], file: Path, same_y: bool = False) -> None:
    """Draw panels in rows of three, with one legend.

    A label has one colour in all panels.

    Args:
        panels: From left to right, then downwards.
        file: The PNG to write.
        same_y: All have one range of y.
    """
    labels = list(dict.fromkeys(s.label for panel in panels for s in panel.series))
    looks = {label: _look(i) for i, label in enumerate(labels)}
    kinds = {s.reported for panel in panels for s in panel.series}
    joined = any(panel.joined for panel in panels)
    with style():
        columns = min(len(panels), PER_ROW)
        rows = math.ceil(len(panels) / columns)
        figure = new_figure(3.0 + 3.7 * columns, 4.4 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=same_y).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel, looks)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        line: dict[str, Any] = {} if joined else {"linestyle": "none"}
        marks = [Line2D([], [], label=label, **looks[label], **line) for label in labels]
        if True in kinds:
            grey: dict[str, Any] = {"marker": "o", "color": GREY, **line}
            marks.append(Line2D([], [], label="measured here", **grey))
            marks.append(Line2D([], [], label="reported", **{**grey, **HOLLOW, **line}))
        figure.legend(handles=marks, loc="outside right center", fontsize=9)
        save(figure, file)


def _draw(axes: Any, panel: Panel, looks: Mapping[str, Mapping[str, Any]]) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    for series in panel.series:
        look = {**looks[series.label], **(HOLLOW if series.reported else {})}
        if not panel.joined:
            look["linestyle"] = "none"
        elif len(series.x) > MOST_MARKED:
            look["marker"] = None
        axes.plot(series.x, series.y, **look)
        if any(error is not None for error in series.error):
            spread = [error or 0.0 for error in series.error]
            axes.errorbar(series.x, series.y, spread, fmt="none", ecolor=look["color"], capsize=2)
    places = [x for series in panel.series for x in series.x]
    if not places:
        axes.text(0.5, 0.5, "nothing yet", ha="center", transform=axes.transAxes, color=GREY)
    elif panel.log:
        room = (max(places) / min(places)) ** 0.08 * 1.05
        log_axis(axes, "x", min(places) / room, max(places) * room)
    if panel.x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.ticks:
        axes.xaxis.set_major_locator(FixedLocator(list(panel.ticks)))


def _look(number_of_label: int) -> dict[str, Any]:
    again, colour = divmod(number_of_label, len(PALETTE))
    marker = MARKERS[again % len(MARKERS)]
    return {"marker": marker, "markersize": 6, "linewidth": 1.5, "color": PALETTE[colour]}


class Grid(NamedTuple):
    """Values over two settings; None where missing."""

    title: str
    rows: tuple[str, Sequence[int]]  # what it is, and its values
    columns: tuple[str, Sequence[int]]
    values: Sequence[Sequence[float | None]]  # rows × columns
    percent: bool = True  # two places; else three digits
    ringed: tuple[int, int] | None = None  # row and column of the chosen one


def draw_grids(grids: Sequence[Grid], file: Path) -> None:
    """Draw grids of numbers from left to right, coloured by value, the chosen cell framed."""
    columns = max(len(grid.columns[1]) for grid in grids)
    rows = max(len(grid.rows[1]) for grid in grids)
    with style():
        figure = new_figure((1.6 + 0.85 * columns) * len(grids), 1.7 + 0.62 * rows)
        for axes, grid in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids, strict=True):
            values = np.array(
                [[np.nan if v is None else v for v in row] for row in grid.values], dtype=float
            )
            axes.imshow(values, cmap="viridis", aspect="auto")
            axes.grid(False)
            axes.set_title(grid.title)
            axes.set_ylabel(grid.rows[0])
            axes.set_xlabel(grid.columns[0])
            axes.set_yticks(range(len(grid.rows[1])), [str(v) for v in grid.rows[1]])
            axes.set_xticks(range(len(grid.columns[1])), [str(v) for v in grid.columns[1]])
            known = values[~np.isnan(values)]
            middle = (known.min() + known.max()) / 2 if len(known) else 0.0
            for (row, column), value in np.ndenumerate(values):
                text = f"{value:.2f}" if grid.percent else number(float(value))
                text = "–" if np.isnan(value) else text
                colour = "white" if value < middle else "black"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
            if grid.ringed is not None:
                row, column = grid.ringed
                corner = (column - 0.47, row - 0.47)
                frame = Rectangle(
                    corner, 0.94, 0.94, fill=False, edgecolor=COLOURS[4], linewidth=2.5
                )
                axes.add_patch(frame)
        save(figure, file)
