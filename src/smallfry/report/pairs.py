"""Interactive drawing of pairs of points in SVG, without scripts.

The first point of a pair is hollow, the second filled; under the pointer a line joins them, and
the pair's text is a tooltip.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from smallfry.report.figure import COLOURS, GREY
from smallfry.report.page import render

__all__ = ["Pair", "draw_pairs"]

WIDTH, HEIGHT, MARGIN = 860, 460, 46


class Pair(NamedTuple):
    """Pair of points.

    Attributes:
        before: x and y.
        after: x and y.
        text: Tooltip.
        changed: Highlighted, with its line always visible.
    """

    before: tuple[float, float]
    after: tuple[float, float]
    text: str
    changed: bool


def draw_pairs(pairs: Sequence[Pair], x: str, y: str) -> Markup:
    """Draw pairs of points.

    Args:
        pairs: At least one.
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
    """
    points = [point for pair in pairs for point in (pair.before, pair.after)]
    (left, right), (low, high) = (_limits([point[axis] for point in points]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[str, str]:
        across = MARGIN + (point[0] - left) / (right - left) * (WIDTH - 2 * MARGIN)
        down = HEIGHT - MARGIN - (point[1] - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return f"{across:.1f}", f"{down:.1f}"

    shown = [
        {
            "before": place(pair.before),
            "after": place(pair.after),
            "text": pair.text,
            "changed": pair.changed,
            "colour": COLOURS[1] if pair.changed else COLOURS[0],
        }
        for pair in sorted(pairs, key=lambda each: each.changed)
    ]
    ticks = {
        "x": [(place((value, low))[0], f"{value:.4g}") for value in _ticks(left, right)],
        "y": [(place((left, value))[1], f"{value:.4g}") for value in _ticks(low, high)],
    }
    size = {"width": WIDTH, "height": HEIGHT, "margin": MARGIN}
    return render(
        "report/templates/pairs.html", pairs=shown, x=x, y=y, ticks=ticks, grey=GREY, **size
    )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    edge = (high - low) * 0.03 or 1.0
    return low - edge, high + edge


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 8)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
