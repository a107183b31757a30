"""Pictures of puzzles: the grid, the prediction and its wrong cells; accuracy by recursion step."""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smallfry.report.figure import GREY, new_figure, save, style

__all__ = ["draw_puzzles"]

GIVEN, WRONG, PLAIN = "#e5e7eb", "#fecaca", "white"
ACROSS = 4
EDGE, FRAME = 0.02, 1.2  # share of the side around it, and the frame's width in points
OPEN = "."


def draw_puzzles(
    grids: Tensor, solutions: Tensor, answers: Tensor, symbols: Sequence[str], file: Path
) -> None:
    """Draw puzzles with their predictions; givens are grey, wrong cells red with the right symbol.

    Args:
        grids: (puzzles, side, side), numbers of symbols.
        solutions: (puzzles, cells).
        answers: (puzzles, cells).
        symbols: One character each.
        file: The PNG to write.
    """
    count = len(grids)
    rows = -(-count // ACROSS)
    with style():
        figure = new_figure(2.6 * ACROSS, 2.8 * rows)
        axes = figure.subplots(rows, ACROSS, squeeze=False).flat
        for number, place in enumerate(axes):
            place.set_axis_off()
            if number < count:
                cells = (part[number].flatten() for part in (grids, answers, solutions))
                _draw_one(place, [c.numpy() for c in cells], symbols)
        save(figure, file)


def _draw_one(place: Any, cells: Sequence[NDArray[np.int64]], symbols: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    given, answered, right = cells
    side = isqrt(len(given))
    wrong = int((answered != right).sum())
    place.set_title("solved" if wrong == 0 else f"{wrong} wrong", fontsize=9)
    edge = EDGE * side  # within which the frame is drawn in full
    place.set_xlim(-edge, side + edge)
    place.set_ylim(side + edge, -edge)
    place.set_aspect("equal")
    for cell in range(side * side):
        row, column = divmod(cell, side)
        open_cell = symbols[given[cell]] == OPEN
        colour = PLAIN if open_cell else GIVEN
        text = symbols[answered[cell]]
        if answered[cell] != right[cell]:
            colour, text = WRONG, f"{text}/{symbols[right[cell]]}"
        place.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor=GREY, lw=0.4))
        size = 130 / side / max(1, len(text))
        place.text(column + 0.5, row + 0.52, text, ha="center", va="center", fontsize=min(10, size))
    frame = Rectangle((0, 0), side, side, fill=False, edgecolor=GREY, lw=FRAME)
    place.add_patch(frame)
