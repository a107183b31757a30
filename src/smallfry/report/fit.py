"""Picture of a fit: accuracy against size and latency of all trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smallfry.report.axes import log_axis
from smallfry.report.figure import COLOURS, GREY, new_figure, plain, save, style

AXES = {"kb": "size of the export, kB", "ms": "CPU time of one image, ms"}
ROOM = 1.25  # beside the outermost points


class Mark(NamedTuple):
    """Point of the picture."""

    name: str
    accuracy: float  # percent of the validation images
    kb: float
    ms: float
    exported: bool = False  # verified on the file; otherwise a trial, at its expected cost
    chosen: bool = False


def draw_fit(marks: Sequence[Mark], limits: Mapping[str, float | None], file: Path) -> None:
    """Draw accuracy against both costs, with the limits of the budget.

    Args:
        marks: Trials and exports.
        limits: Limit by ``kb`` and ``ms``; None for no limit.
        file: The PNG to write.
    """
    with style():
        figure = new_figure(11.0, 4.6)
        for axes, cost in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
            _draw(axes, cost, marks, limits[cost])
        figure.axes[0].set_ylabel("validation accuracy, %")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        other = figure.axes[1].get_legend_handles_labels()
        known = dict(zip(labels + other[1], handles + other[0], strict=True))
        if known:
            figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4)
        save(figure, file)


def _draw(axes: Any, cost: str, marks: Sequence[Mark], limit: float | None) -> None:
    axes.set_xlabel(AXES[cost])
    kinds = {
        "trained, at its expected cost": [m for m in marks if not m.exported],
        "exported and verified": [m for m in marks if m.exported],
        "chosen": [m for m in marks if m.chosen],
    }
    looks: list[dict[str, Any]] = [
        {"marker": "o", "s": 26, "facecolors": "none", "edgecolors": GREY},
        {"marker": "o", "s": 46, "color": COLOURS[0], "zorder": 3},
        {"marker": "o", "s": 190, "facecolors": "none", "edgecolors": COLOURS[4], "linewidths": 2},
    ]
    for (label, points), look in zip(kinds.items(), looks, strict=True):
        if points:
            x = [getattr(mark, cost) for mark in points]
            axes.scatter(x, [mark.accuracy for mark in points], label=label, **look)
    front = pareto([m for m in marks if m.exported], cost)
    if len(front) > 1:
        x, y = [getattr(m, cost) for m in front], [m.accuracy for m in front]
        axes.step(x, y, where="post", color=COLOURS[0], linewidth=1, label="front of the exports")
    places = [getattr(mark, cost) for mark in marks]
    if limit is not None:
        axes.axvline(limit, color=COLOURS[1], linestyle="--", label="budget")
        places.append(limit)
    if places:
        log_axis(axes, "x", min(places) / ROOM, max(places) * ROOM)
    for mark in [m for m in marks if m.chosen]:
        axes.annotate(
            plain([mark.name])[0],
            (getattr(mark, cost), mark.accuracy),
            xytext=(0, -16),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )


def pareto(marks: Sequence[Mark], cost: str) -> list[Mark]:
    """Return the marks that no cheaper one equals in accuracy, cheapest first."""
    front: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (getattr(m, cost), -m.accuracy)):
        if not front or mark.accuracy > front[-1].accuracy:
            front.append(mark)
    return front
