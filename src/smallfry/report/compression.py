"""Pictures of a compression: sizes of layers, and what each layer's shrinking changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from smallfry.report.figure import COLOURS, GREY, new_figure, plain, save, style

FIGURES = {
    "parameters": ("parameters", ""),
    "bytes": ("stored weights", "B"),
    "macs": ("multiply-accumulates, one image", ""),
}  # title and unit
MOST = 100  # rows of a picture
SMALL = 0.01  # share of every total, below which layers that stay as they are go together
LONGEST = 60  # characters of a name
ROW = 0.21  # inches
LETTER = 0.065  # inches
DECADES = 6  # of the colours
Layer = Mapping[str, Any]


def draw_layers(layers: Sequence[Layer], file: Path) -> None:
    """Draw parameters, bytes and multiply-accumulates of each layer before and after.

    Small layers that stay as they are, and all but the largest of very many, are one row.

    Args:
        layers: As of ``compression.json``: name, and ``before`` and ``after`` of each figure.
        file: The PNG to write.
    """
    shown = _rows(layers)
    places, names = np.arange(len(shown)), [shorten(each["name"]) for each in shown]
    with style():
        figure = new_figure(10.5 + _width(names), 1.3 + ROW * max(3, len(shown)))
        for axes, (name, (title, unit)) in zip(
            figure.subplots(1, len(FIGURES), sharey=True), FIGURES.items(), strict=True
        ):
            before, after = ([each[name][end] for each in shown] for end in ("before", "after"))
            axes.barh(places, before, 0.84, color="#d1d5db", label="before")
            axes.barh(places, after, 0.46, color=COLOURS[0], label="after")
            axes.set_title(title)
            axes.tick_params(labelsize=9)
            axes.set_axisbelow(True)
            axes.grid(False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(EngFormatter(unit, sep=" " if unit else ""))
            axes.set_xlim(0, 1.16 * max(1, *before, *after))
            for place, pair in enumerate(zip(before, after, strict=True)):
                if pair[0] != pair[1]:
                    axes.annotate(
                        _change(*pair), (max(pair), place), (4, 0), textcoords="offset points",
                        va="center", fontsize=7, color=GREY,
                    )  # fmt: skip
        first = figure.axes[0]
        first.set_yticks(places, plain(names), fontsize=8)
        first.set_ylim(len(shown) - 0.4, -0.6)
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
        save(figure, file)


def draw_profile(profile: Mapping[str, Any], file: Path) -> None:
    """Draw what each choice for one layer alone changes, with the choice that was taken framed.

    Of very many layers it shows those of the greatest costs.

    Args:
        profile: ``layers`` has the cost of each choice by layer and choice, None where it is not
            finite, ``chosen`` the choice of a layer, ``choices`` and ``costs`` words for both, with
            units.
        file: The PNG to write.
    """
    layers, chosen = profile["layers"], profile["chosen"]
    names = _most_sensitive(layers)
    words = [shorten(name) for name in names]
    columns = sorted({*chosen.values(), *(c for each in layers.values() for c in each)}, key=float)
    costs = np.array([[layers[n].get(c, np.nan) for c in columns] for n in names], dtype=float)
    norm = _colours(costs)
    with style():
        height = 1.5 + ROW * max(3, len(names))
        figure = new_figure(2.4 + _width(words) + 0.5 * len(columns), height)
        axes = figure.subplots()
        axes.set_facecolor("#f3f4f6")
        picture = axes.imshow(costs, cmap="YlOrRd", norm=norm, aspect="auto")
        axes.grid(False)
        for (row, column), cost in np.ndenumerate(costs):
            if np.isfinite(cost):
                colour = "white" if norm(cost) > 0.62 else "black"
                axes.text(column, row, _short(cost), ha="center", va="center_baseline", fontsize=7,
                          color=colour)  # fmt: skip
        for row, name in enumerate(names):
            column = columns.index(chosen[name])
            look: dict[str, Any] = {"edgecolor": COLOURS[0], "linewidth": 2, "clip_on": False}
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, **look))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(names)), plain(words), fontsize=8)
        axes.set_xlabel(profile["choices"])
        of = f" ({len(names)} of {len(layers)})" if len(names) < len(layers) else ""
        axes.set_title(f"one layer{of} alone; framed: chosen for all together", fontsize=10)
        bar = figure.colorbar(picture, ax=axes, aspect=5 * height)
        bar.set_label(profile["costs"])
        save(figure, file)


def shorten(name: str) -> str:
    """Cut the middle out of a long name."""
    if len(name) <= LONGEST:
        return name
    half = (LONGEST - 1) // 2
    return f"{name[: LONGEST - 1 - half]}…{name[-half:]}"


def _width(names: Sequence[str]) -> float:
    """Estimate the inches of the longest name."""
    return LETTER * max(map(len, names), default=0)


def _rows(layers: Sequence[Layer]) -> list[Layer]:
    """Choose the layers that have a row of their own, and add up the others."""
    totals = {name: max(1, _sum(layers, name, "before")) for name in FIGURES}
    matters = [
        each
        for each in layers
        if any(
            each[name]["before"] != each[name]["after"]
            or each[name]["before"] >= SMALL * totals[name]
            for name in FIGURES
        )
    ]
    largest = sorted(matters, key=lambda each: -max(_share(each, n, totals) for n in FIGURES))
    kept = {each["name"] for each in largest[:MOST]}
    shown = [each for each in layers if each["name"] in kept]
    others = [each for each in layers if each["name"] not in kept]
    if not others:
        return shown
    rest: dict[str, Any] = {"name": f"{len(others)} other{'s' if len(others) > 1 else ''}"}
    for name in FIGURES:
        rest[name] = {end: _sum(others, name, end) for end in ("before", "after")}
    return [*shown, rest]


def _sum(layers: Sequence[Layer], name: str, end: str) -> int:
    return sum(each[name][end] for each in layers)


def _share(layer: Layer, name: str, totals: Mapping[str, int]) -> float:
    return float(max(layer[name].values()) / totals[name])


def _change(before: int, after: int) -> str:
    """Format the change of a figure."""
    if not before:
        return "new"
    return "gone" if not after else f"× {after / before:.3g}"


def _most_sensitive(layers: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Return the layers of the greatest costs, in their order."""
    most = {name: max([0.0, *filter(None, each.values())]) for name, each in layers.items()}
    ranked = sorted(layers, key=lambda name: -most[name])
    kept = set(ranked[:MOST])
    return [name for name in layers if name in kept]


def _colours(costs: Any) -> Normalize:
    """Scale colours to the logarithm of the costs, where some are above zero."""
    positive = costs[np.isfinite(costs) & (costs > 0)]
    if not len(positive):
        return Normalize(0, 1)
    high = float(positive.max())
    low = max(float(positive.min()), high * 10.0**-DECADES)
    return LogNorm(low if low < high else high / 10, high, clip=True)


def _short(cost: float) -> str:
    """Format a cost in few characters."""
    return f"{cost:.0f}" if cost >= 10 else f"{cost:.1g}".replace("e-0", "e-")
