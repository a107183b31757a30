"""Plots of an optimizer race: losses, tuning and errors of Fisher matrices."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from smallfry.report.axes import log_axis
from smallfry.report.figure import COLOURS, GREY, in_legend, new_figure, save, style
from smallfry.report.race_curves import Axis, Band, Loss, band, run_of
from smallfry.report.races import LayerError, Record, Row, Trial, by_contestant, layers

OURS = (*COLOURS, "#0891b2", "#ca8a04", "#db2777", "#84cc16", "#7c2d12", "#c084fc", "#0f766e")
PEERS = ("#111827", "#64748b", "#9ca3af", "#8d6e63", "#5f7a6b", "#7c6f8a", "#90a4ae")
DASHES = ((5, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5), (3, 1.2, 1, 1.2, 1, 1.2), (9, 3), (2.5, 2.5))
AXES: Mapping[Axis, str] = {"step": "iterations", "epoch": "epochs", "seconds": "seconds"}
RING: dict[str, Any] = {
    "markersize": 10,
    "markerfacecolor": "none",
    "markeredgecolor": "black",
}
LONGEST = 26  # letters of a name that are drawn
MOST_LAYERS = 8


class Look(NamedTuple):
    """Line style of a contestant in all plots."""

    colour: str
    dashes: tuple[float, ...]  # none: a solid line
    width: float

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of a line."""
        dashes = (0, self.dashes) if self.dashes else "-"
        return {"color": self.colour, "linestyle": dashes, "linewidth": self.width}


def looks(records: Iterable[Record]) -> dict[str, Look]:
    """Assign a style to every contestant: ours in colours, peers grey and dashed."""
    found: dict[str, Look] = {}
    ours = peers = 0
    for contestant, group in by_contestant(records).items():
        if group[0].get("family") == "ours":
            again = ours // len(OURS)  # a colour's second contestant is dashed too
            found[contestant] = Look(OURS[ours % len(OURS)], (8, 1.5) if again else (), 1.6)
            ours += 1
        else:
            colour, dashes = PEERS[peers % len(PEERS)], DASHES[peers % len(DASHES)]
            found[contestant] = Look(colour, dashes, 1.5)
            peers += 1
    return found


class Panel(NamedTuple):
    """Data of one loss panel."""

    loss: Loss
    axis: Axis
    closely: bool = False  # the second half alone, scaled to the best three quarters there


def draw_losses(
    records: Sequence[Record],
    rows: Sequence[Row],
    panels: Sequence[Panel],
    shown: Mapping[str, Look],
    clock: str,
    file: Path,
) -> None:
    """Draw the losses of a race; the legend is in the rows' order.

    Args:
        records: Records of one problem and one full phase.
        rows: Rows of the same race.
        panels: From left to right.
        shown: The look of every contestant.
        clock: Clock of the seconds.
        file: The PNG to write.
    """
    groups = by_contestant(records)
    runs = {
        row.contestant: [run_of(record["measured"]) for record in groups[row.contestant]]
        for row in rows
    }
    with style():
        figure = new_figure(3.3 + 3.8 * len(panels), 4.8)
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            bands = {name: band(own, panel.axis, panel.loss) for name, own in runs.items()}
            end = max((float(found.x[-1]) for found in bands.values() if len(found.x)), default=1.0)
            start = end / 2 if panel.closely else 0.0
            low, high = _limits(list(bands.values()), start, 0.75 if panel.closely else 1.0)
            for contestant, found in reversed(bands.items()):  # the best on top
                _draw_band(axes, found, shown[contestant], start, high)
            name = AXES[panel.axis]
            axes.set_xlabel(f"{name}, {clock}" if panel.axis == "seconds" else name)
            axes.set_xlim(start, max(end, 1e-9) * 1.02)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            title = f"{'training' if panel.loss == 'train' else panel.loss} loss per pixel"
            axes.set_title(f"{title}, second half" if panel.closely else title)
            log_axis(axes, "y", low, high)
        _legend(figure, [(row.label, shown[row.contestant]) for row in rows])
        save(figure, file)


def draw_tuning(trials: Sequence[Trial], shown: Mapping[str, Look], file: Path) -> None:
    """Draw the trials of tuning, a row of dots for each contestant, the chosen one ringed.

    Args:
        trials: Trials of one problem.
        shown: The look of every contestant.
        file: The PNG to write.
    """
    names = {trial.contestant: trial.label for trial in trials}
    places = {contestant: place for place, contestant in enumerate(names)}
    finite = [t.validation for t in trials if t.validation is not None and t.validation > 0]
    # One wild trial must not press all others into a corner; a chosen one is always shown.
    kept = [30 * min(finite, default=1.0)]
    kept += [t.validation for t in trials if t.chosen and t.validation is not None]
    edge = min(max(finite, default=1.0), max(kept)) * 1.15
    low = min(finite, default=edge / 10) / 1.08
    with style():
        figure = new_figure(8.4, 1.5 + 0.3 * max(3, len(names)))
        axes = figure.subplots()
        for trial in trials:
            colour, place = shown[trial.contestant].colour, places[trial.contestant]
            if trial.validation is None:
                axes.plot(edge, place, "x", color=colour, clip_on=False)
            elif trial.validation > edge:
                axes.plot(edge, place, ">", color=colour, clip_on=False)
            else:
                value = max(trial.validation, low)
                axes.plot(value, place, "o", color=colour, alpha=0.75, markersize=5)
                if trial.chosen:
                    axes.plot(value, place, "o", **RING)
        axes.set_yticks(range(len(names)), written(names.values()))
        axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
        axes.set_xlabel("validation loss per pixel at the end of the trial")
        log_axis(axes, "x", low, edge)
        marks = [("o", "a trial"), ("ring", "the chosen one"), ("x", "diverged")]
        if any(t.validation is not None and t.validation > edge for t in trials):
            marks.append((">", "beyond this axis"))
        figure.legend(
            [_mark(mark) for mark, _ in marks],
            [text for _, text in marks],
            loc="outside upper center",
            ncols=len(marks),
        )
        save(figure, file)


def draw_fisher(errors: Sequence[LayerError], shown: Mapping[str, Look], file: Path) -> None:
    """Draw the errors of Fisher matrices over steps, one panel per layer, eight at most.

    Args:
        errors: Errors of one problem.
        shown: The look of every contestant.
        file: The PNG to write.
    """
    names = some(layers(errors))
    columns = min(4, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    drawn = [error for error in errors if error.layer in names]
    values = [value for error in drawn for value in error.errors if value > 0]
    low, high = min(values, default=0.1), max(values, default=1.0)
    with style():
        figure = new_figure(2.6 * columns + 2.6, max(3.6, 2.6 * rows))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in list(grid.flat)[len(names) :]:
            axes.set_visible(False)
        for axes, layer in zip(grid.flat, names, strict=False):
            for error in drawn:
                if error.layer == layer:
                    marker = "o" if len(error.steps) == 1 else None
                    line = shown[error.contestant].line
                    axes.plot(error.steps, error.errors, marker=marker, markersize=4, **line)
            axes.set_title(f"layer {written([layer])[0]}")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.tick_params(labelbottom=True)
            if high > 20 * low:
                log_axis(axes, "y", low / 1.1, high * 1.1)
            else:
                axes.set_ylim(0, high * 1.05)
        figure.supxlabel("step of the common trajectory", fontsize=10)
        figure.supylabel("relative Frobenius error", fontsize=10)
        _legend(figure, [(e.label, shown[e.contestant]) for e in errors])
        save(figure, file)


def some(names: Sequence[str]) -> list[str]:
    """Select the layers to draw: all, or eight evenly spaced ones."""
    if len(names) <= MOST_LAYERS:
        return list(names)
    last = len(names) - 1
    return [names[round(i * last / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


def written(names: Iterable[str]) -> list[str]:
    """Shorten and escape names for plots, on one line."""
    lines = [" ".join(name.split()).replace("\\", "/") for name in names]
    short = [line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…" for line in lines]
    return in_legend(short)


def _limits(bands: Sequence[Band], start: float, share: float) -> tuple[float, float]:
    """Choose limits that hold a share of the bands' first losses from a position on.

    What explodes later is cut.
    """
    lows, firsts = [], []
    for found in bands:
        seen = found.x >= start
        if seen.any():
            lows.append(float(found.low[seen].min()))
            firsts.append(float(found.median[seen][0]))
    low = min((value for value in lows if value > 0), default=0.1)
    firsts.sort()
    high = firsts[math.ceil(share * len(firsts)) - 1] if firsts else 1.0
    edge = max(high / low, 1.001) ** 0.04
    return low / edge, max(high, low) * edge


def _draw_band(axes: Any, found: Band, look: Look, start: float, top: float) -> None:
    if not len(found.x):
        return
    axes.fill_between(found.x, found.low, found.high, color=look.colour, alpha=0.12, linewidth=0)
    axes.plot(found.x, found.median, **look.line)
    if found.diverged:  # marked where it ends, or where it leaves the picture for good
        last = int(np.flatnonzero(found.median <= top).max(initial=0))
        last = min(last + 1, len(found.x) - 1)
        x, y = found.x[last], min(found.median[last], top)
        if x >= start:
            axes.plot(x, y, "x", color=look.colour, clip_on=False)


def _legend(figure: Any, entries: Sequence[tuple[str, Look]]) -> None:
    kept = dict.fromkeys(entries)
    handles = [Line2D([], [], **look.line) for _, look in kept]
    names = written(name for name, _ in kept)
    if handles:
        place = "outside right upper"
        figure.legend(handles, names, loc=place, handlelength=3.2, fontsize=9, labelspacing=0.6)


def _mark(kind: str) -> Line2D:
    if kind == "ring":
        return Line2D([], [], linestyle="", marker="o", **RING)
    return Line2D([], [], linestyle="", marker=kind, color=GREY)
