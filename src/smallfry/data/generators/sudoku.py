"""Sudoku of sides 4, 6 and 9: solver, generator of minimal puzzles, symmetries, canonical form.

A puzzle is dug out of a random solved grid: cells are visited in random order and emptied unless
that gives a second solution, which leaves the puzzle minimal; ``extra_clues`` are then given back.

Symbols: 0 padding, 1 an open cell, 2 to n + 1 the digits.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, permutations, product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data.generators.grids import GridSettings, Puzzle, register
from smallfry.data.registered import settings_from
from smallfry.data.symmetry import Symmetry
from smallfry.errors import UsageError

__all__ = ["Boxes", "Sudoku", "SudokuSettings", "guesses", "solutions"]

OPEN, FIRST = 1, 2  # the number of an open cell, and of the digit 1
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


class Boxes(NamedTuple):
    """Shape of the boxes, which gives that of the grid."""

    rows: int
    columns: int

    @property
    def side(self) -> int:
        """Side of the grid, and number of digits."""
        return self.rows * self.columns


class Position(NamedTuple):
    """Digits in each unit as bits, and the open cells."""

    rows: list[int]
    columns: list[int]
    boxes: list[int]
    grid: list[int]  # digits from 0, -1 in open cells


def solutions(
    grid: Sequence[int], boxes: Boxes, order: random.Random | None = None
) -> Iterator[list[int]]:
    """Yield all solutions, branching on the cell with the fewest candidates.

    Args:
        grid: Digits 0 to n − 1 row by row, −1 in open cells.
        boxes: Shape of the boxes.
        order: Source of the order in which candidates are tried; default ascending.
    """
    start = _position(grid, boxes)
    if start is not None:
        yield from _search(start, boxes, order, [0])


def guesses(grid: Sequence[int], boxes: Boxes) -> int:
    """Count the branchings among several candidates until the first solution."""
    counted = [0]
    start = _position(grid, boxes)
    if start is not None:
        next(_search(start, boxes, None, counted), None)
    return counted[0]


def _position(grid: Sequence[int], boxes: Boxes) -> Position | None:
    """Set up the bits of a grid; None if two equal digits meet."""
    side = boxes.side
    position = Position([0] * side, [0] * side, [0] * side, list(grid))
    for cell, digit in enumerate(grid):
        if digit >= 0:
            units = _units(cell, boxes)
            bit = 1 << digit
            if any(masks[unit] & bit for masks, unit in zip(position[:3], units, strict=True)):
                return None
            for masks, unit in zip(position[:3], units, strict=True):
                masks[unit] |= bit
    return position


@cache
def _units(cell: int, boxes: Boxes) -> tuple[int, int, int]:
    row, column = divmod(cell, boxes.side)
    return row, column, row // boxes.rows * boxes.rows + column // boxes.columns


def _search(
    position: Position, boxes: Boxes, order: random.Random | None, counted: list[int]
) -> Iterator[list[int]]:
    rows, columns, squares, grid = position
    full = (1 << boxes.side) - 1
    best, fewest, candidates = -1, boxes.side + 1, 0
    for cell, digit in enumerate(grid):
        if digit < 0:
            row, column, square = _units(cell, boxes)
            free = full & ~(rows[row] | columns[column] | squares[square])
            count = free.bit_count()
            if count < fewest:
                best, fewest, candidates = cell, count, free
                if count <= 1:
                    break
    if best < 0:
        yield list(grid)
        return
    if fewest > 1:
        counted[0] += 1
    row, column, square = _units(best, boxes)
    digits = [d for d in range(boxes.side) if candidates >> d & 1]
    for digit in digits if order is None else _shuffled(digits, order):
        bit = 1 << digit
        rows[row] |= bit
        columns[column] |= bit
        squares[square] |= bit
        grid[best] = digit
        yield from _search(position, boxes, order, counted)
        grid[best] = -1
        rows[row] ^= bit
        columns[column] ^= bit
        squares[square] ^= bit


def _shuffled(items: Sequence[int], order: random.Random) -> list[int]:
    """Shuffle by ``random()`` alone, whose numbers Python keeps the same for all time."""
    return [item for _, item in sorted((order.random(), item) for item in items)]


@dataclass(frozen=True, kw_only=True)
class SudokuSettings(GridSettings):
    """Settings of generated Sudoku.

    Args:
        extra_clues: Clues beyond those of a minimal puzzle.
    """

    extra_clues: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.extra_clues <= 81:
            raise UsageError(f"data.options.extra_clues is 0 to 81, got {self.extra_clues}")


@dataclass(frozen=True)
class Sudoku:
    """Sudoku of one size."""

    boxes: Boxes
    extra_clues: int = 0
    recipe: int = 1

    @property
    def side(self) -> int:
        """Side of the grid."""
        return self.boxes.side

    @property
    def usual(self) -> int:
        """Usual number of puzzles; 36 symmetry classes of minimal 4×4 ones are all there are."""
        return 30 if self.side == 4 else 1000

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, open cell and digits."""
        return ("_", ".", *map(str, range(1, self.side + 1)))

    def draw(self, seed: int, number: int) -> Puzzle:
        """Generate a puzzle with exactly one solution; its difficulty is the solver's guesses."""
        order = random.Random(f"sudoku {self.side} {seed} {number}")
        cells = self.side**2
        solved = next(solutions([-1] * cells, self.boxes, order))
        grid = list(solved)
        emptied = []
        for cell in _shuffled(range(cells), order):
            grid[cell] = -1
            if len(list(islice(solutions(grid, self.boxes), 2))) == 1:
                emptied.append(cell)
            else:
                grid[cell] = solved[cell]
        for cell in _shuffled(emptied, order)[: self.extra_clues]:
            grid[cell] = solved[cell]
        return Puzzle(self._array(grid), self._array(solved), guesses(grid, self.boxes))

    def canonical(self, puzzle: Puzzle) -> tuple[str, str]:
        """Return the smallest image of the solution, and of the clues in it."""
        digits = puzzle.solution.astype(np.int64) - FIRST
        clues = puzzle.grid > OPEN
        square = self.boxes.rows == self.boxes.columns
        best, kept = "", ""
        for transposed in (False, True) if square else (False,):
            turned = (digits.T, clues.T) if transposed else (digits, clues)
            found, masks = self._smallest(*turned)
            if not best or (found, masks) < (best, kept):
                best, kept = found, masks
        return best, f"{best} {kept}"

    def symmetries(self, count: int) -> Symmetry:
        """Draw orders of bands, rows, stacks, columns and digits, and the transpose."""
        side, (down, across) = self.side, self.boxes
        rows = _drawn_lines(count, side, down)
        columns = _drawn_lines(count, side, across)
        cells = rows[:, :, None] * side + columns[:, None, :]
        if down == across:
            turned = torch.rand(count) < 0.5
            cells = torch.where(turned[:, None, None], cells.transpose(1, 2), cells)
        digits = FIRST + torch.rand(count, side).argsort(1)
        still = torch.arange(FIRST).expand(count, -1)
        return Symmetry(cells.flatten(1), torch.cat([still, digits], dim=1))

    def _smallest(self, grid: NDArray[np.int64], mask: NDArray[np.bool_]) -> tuple[str, str]:
        """Find the smallest grid over all first rows and orders of columns, and its clues.

        With these fixed and the first row relabelled to 1 … n, the other rows of each band and
        the bands themselves are smallest in ascending order, so no order of rows is tried.
        """
        side, down = self.side, self.boxes.rows
        orders = _line_orders(side, self.boxes.columns)  # (orders, side)
        grids = grid[:, orders].transpose(1, 0, 2)  # (orders, rows, columns)
        masks = mask[:, orders].transpose(1, 0, 2)
        names = grids.argsort(2)  # (orders, first row, digit): its new name
        values = self._row_values(names, grids)
        first = values.reshape(len(orders), side, side // down, down)
        inner = first.argsort(-1, kind="stable")  # rows within bands
        sorted_rows = np.take_along_axis(first, inner, -1)
        outer = sorted_rows[..., 0].argsort(-1, kind="stable")  # bands
        ordered = np.take_along_axis(sorted_rows, outer[..., None], axis=2)
        flat = ordered.reshape(-1, side)
        order = np.lexsort(flat.T[::-1])
        smallest = flat[order[0]]
        alike = np.flatnonzero((flat == smallest).all(1))
        seen = []
        for index in alike.tolist():
            which, start = divmod(index, side)
            bands = outer[which, start]
            rows = [
                band * down + row for band in bands for row in inner[which, start, band].tolist()
            ]
            seen.append("".join(np.where(masks[which][rows], "1", "0").flat))
        return "-".join(map(str, smallest.tolist())), min(seen)

    @staticmethod
    def _row_values(names: NDArray[np.int64], grids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Compute (orders, first row, row): rows as numbers in the names of each first row."""
        orders, side, _ = grids.shape
        weights = side ** np.arange(side - 1, -1, -1)
        values = np.empty((orders, side, side), np.int64)
        for start in range(side):
            for row in range(side):
                renamed = np.take_along_axis(names[:, start], grids[:, row], axis=1)
                values[:, start, row] = renamed @ weights
        return values

    def _array(self, grid: Sequence[int]) -> NDArray[np.uint8]:
        digits = np.array(grid).reshape(self.side, self.side)
        return np.where(digits < 0, OPEN, digits + FIRST).astype(np.uint8)


def _drawn_lines(count: int, side: int, group: int) -> torch.Tensor:
    """Draw orders of lines that keep groups of them together, (count, side)."""
    outer = torch.rand(count, side // group).argsort(1)
    inner = torch.rand(count, side // group, group).argsort(2)
    return (outer[:, :, None] * group + inner).flatten(1)


@cache
def _line_orders(side: int, group: int) -> NDArray[np.int64]:
    """List all orders of lines that keep groups of them together, (orders, side)."""
    groups = side // group
    inner = list(permutations(range(group)))
    return np.array(
        [
            [b * group + line for b, lines in zip(blocks, chosen, strict=True) for line in lines]
            for blocks in permutations(range(groups))
            for chosen in product(inner, repeat=groups)
        ]
    )


def _build(name: str, options: Mapping[str, Any]) -> tuple[Sudoku, SudokuSettings]:
    settings: SudokuSettings = settings_from(SudokuSettings, options)
    boxes = Boxes(*BOXES[int(name.removeprefix("sudoku"))])
    return Sudoku(boxes, settings.extra_clues), settings


register((f"sudoku{side}" for side in BOXES), _build)
