"""Plot of activation ranges over the applications of a shared block."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from smallfry.report.figure import COLOURS, GREY, new_figure, save, style

COLUMNS = 2
ANSWER, THOUGHT = "y", "z"  # what an application rewrites


class Span(Protocol):
    """Input range of a product of the block, in one application of the block."""

    @property
    def product(self) -> str:
        """Name of the product, such as attn.qkv."""

    @property
    def layer(self) -> int:
        """Layer of the block, from 0."""

    @property
    def step(self) -> int:
        """Recursion step, from 1."""

    @property
    def application(self) -> int:
        """Application of the block, from 1."""

    @property
    def low(self) -> float:
        """Smallest input."""

    @property
    def high(self) -> float:
        """Largest input."""


def draw_ranges(spans: Sequence[Span], file: Path) -> None:
    """Draw a panel for each kind of product, with a band for each layer.

    Bars at the right show the range that one scale for all applications would take.

    Args:
        spans: Spans of all products.
        file: The PNG to write.
    """
    products = list(dict.fromkeys(span.product for span in spans))
    layers = sorted({span.layer for span in spans})
    ends = _ends(spans)
    applications = max(span.application for span in spans)
    rows = -(-len(products) // COLUMNS)
    with style():
        figure = new_figure(12, 0.9 + 3.1 * rows)
        figure.suptitle("what the products of the shared block are given: least and greatest")
        grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axes, product in zip(grid, products, strict=False):
            _draw(axes, [span for span in spans if span.product == product], applications)
            _mark_steps(axes, ends, applications)
            axes.set_title(f"input of {product}", pad=18)
        for axes in grid[len(products) :]:
            axes.set_axis_off()
        marks = [
            Line2D([], [], color=_colour(layer), marker=".", label=f"layer {layer}")
            for layer in layers
        ]
        marks.append(Line2D([], [], color=GREY, linewidth=5, label="one scale\nfor all"))
        figure.legend(handles=marks, loc="outside right center", fontsize=9)
        figure.supxlabel(
            f"applications of the block, in order: {THOUGHT} is a latent step, {ANSWER} the answer "
            "that ends a recursion step",
            fontsize=10,
        )
        save(figure, file)


def _draw(axes: Any, spans: Sequence[Span], applications: int) -> None:
    for layer in sorted({span.layer for span in spans}):
        chosen = sorted((s for s in spans if s.layer == layer), key=lambda s: s.application)
        at = [span.application for span in chosen]
        lows, highs = [span.low for span in chosen], [span.high for span in chosen]
        colour = _colour(layer)
        axes.fill_between(at, lows, highs, color=colour, alpha=0.05, linewidth=0)
        for values in (lows, highs):
            axes.plot(at, values, color=colour, marker=".", linewidth=1.3)
        place = applications + 1 + 0.45 * layer
        bar = {"linewidth": 5, "alpha": 0.75, "solid_capstyle": "butt"}
        axes.plot([place, place], [min(lows), max(highs)], color=colour, **bar)
    axes.axhline(0, color=GREY, linewidth=0.8)


def _mark_steps(axes: Any, ends: Sequence[int], applications: int) -> None:
    """Draw ticks of the rewritten variables, a line after each recursion step, and its number."""
    ticks = range(1, applications + 1)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.set_xticklabels([ANSWER if tick in ends else THOUGHT for tick in ticks], fontsize=8)
    axes.grid(visible=False, axis="x")
    begin = 0
    for number, end in enumerate(ends, start=1):
        axes.axvline(end + 0.5, color=GREY, linewidth=0.9, linestyle="--")
        if len(ends) > 1:
            axes.annotate(
                f"step {number}",
                ((begin + end + 1) / 2, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=8,
                color=GREY,
            )
        begin = end


def _ends(spans: Sequence[Span]) -> list[int]:
    """List the last application of each recursion step."""
    last: dict[int, int] = {}
    for span in spans:
        last[span.step] = max(span.application, last.get(span.step, 0))
    return [last[step] for step in sorted(last)]


def _colour(layer: int) -> str:
    return COLOURS[layer % len(COLOURS)]
