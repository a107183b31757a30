"""Mazes of side 9 to 30 with one shortest path between two ends.

A perfect maze is carved by a random depth-first walk on the cells of odd coordinates, so that
every two cells have one path. Some walls may be taken out again (``braid``), as long as the
shortest path between the ends stays the only one of its length. Of an even side, the last row and
column are wall.

Symbols: 0 padding, 1 wall, 2 free, 3 start, 4 goal, 5 path; the solution marks the cells between
the ends as path.
"""

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data.generators.grids import GridSettings, Puzzle, register
from smallfry.data.registered import settings_from
from smallfry.data.symmetry import Symmetry
from smallfry.errors import UsageError

__all__ = ["Maze", "MazeSettings", "shortest_path"]

WALL, FREE, START, GOAL, PATH = range(1, 6)
SIDES = range(9, 31)
MOST_TRIES = 200  # mazes, to find one with a path that is long enough
TRIED = 8  # pairs of ends, of which those furthest apart are taken

Cell = tuple[int, int]


def shortest_path(walls: NDArray[np.bool_], start: Cell, goal: Cell) -> tuple[list[Cell], int]:
    """Find a shortest path by breadth-first search.

    Args:
        walls: (side, side).
        start: First cell.
        goal: Last cell.

    Returns:
        The path with both ends, and the number of paths of its length; an empty one and 0 if the
        ends are not connected.
    """
    distance, count = {start: 0}, {start: 1}
    before: dict[Cell, Cell] = {}
    waiting = deque([start])
    while waiting:
        cell = waiting.popleft()
        if cell == goal:
            break
        for other in _beside(cell, walls):
            if other not in distance:
                distance[other], count[other] = distance[cell] + 1, 0
                before[other] = cell
                waiting.append(other)
            if distance[other] == distance[cell] + 1:
                count[other] += count[cell]
    if goal not in distance:
        return [], 0
    path = [goal]
    while path[-1] != start:
        path.append(before[path[-1]])
    return path[::-1], count[goal]


def _beside(cell: Cell, walls: NDArray[np.bool_]) -> Iterator[Cell]:
    row, column = cell
    for other in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
        if all(0 <= at < len(walls) for at in other) and not walls[other]:
            yield other


@dataclass(frozen=True, kw_only=True)
class MazeSettings(GridSettings):
    """Settings of generated mazes.

    Args:
        braid: Walls to take out, which makes loops.
        min_path: Least share of the free cells that the path takes.
    """

    braid: int = 0
    min_path: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.braid <= 100:
            raise UsageError(f"data.options.braid is 0 to 100, got {self.braid}")
        if not 0 <= self.min_path <= 0.9:
            raise UsageError(f"data.options.min_path is 0 to 0.9, got {self.min_path}")


@dataclass(frozen=True)
class Maze:
    """Mazes of one size."""

    side: int
    braid: int = 0
    min_path: float = 0.0
    usual: int = 1000
    recipe: int = 1

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, wall, free cell, ends and path."""
        return ("_", "#", ".", "S", "G", "o")

    def draw(self, seed: int, number: int) -> Puzzle:
        """Generate a maze; its difficulty is the number of steps of its path."""
        order = random.Random(f"maze {self.side} {seed} {number}")
        for _ in range(MOST_TRIES):
            walls = _carved(self.side, order)
            cells = [(int(r), int(c)) for r, c in np.argwhere(~walls)]
            pairs = [tuple(_some(cells, 2, order)) for _ in range(TRIED)]
            start, goal = max(pairs, key=lambda ends: len(shortest_path(walls, *ends)[0]))
            _braid(walls, start, goal, self.braid, order)
            path, _ = shortest_path(walls, start, goal)
            if len(path) >= self.min_path * (~walls).sum():
                break
        else:
            raise UsageError(
                f"maze{self.side}: no path of {self.min_path:.0%} of the free cells was found; "
                "lower data.options.min_path"
            )
        grid = np.where(walls, WALL, FREE).astype(np.uint8)
        grid[start], grid[goal] = START, GOAL
        solution = grid.copy()
        for cell in path[1:-1]:
            solution[cell] = PATH
        return Puzzle(grid, solution, len(path) - 1)

    def canonical(self, puzzle: Puzzle) -> tuple[str, str]:
        """Return the smallest of the eight images of the solution, twice: it has the maze in it."""
        turned = [np.rot90(puzzle.solution, k) for k in range(4)]
        smallest = min("".join(map(str, g.flat)) for t in turned for g in (t, t.T))
        return smallest, smallest

    def symmetries(self, count: int) -> Symmetry:
        """Draw from the eight symmetries of the square."""
        cells = torch.arange(self.side**2).view(self.side, self.side)
        turned = [cells.rot90(k) for k in range(4)]
        every = torch.stack([g.flatten() for t in turned for g in (t, t.T)])
        symbols = torch.arange(len(self.symbols)).expand(count, -1)
        return Symmetry(every[torch.randint(8, (count,))], symbols)


def _carved(side: int, order: random.Random) -> NDArray[np.bool_]:
    """Carve a perfect maze, (side, side), bool: True is wall."""
    walls = np.ones((side, side), dtype=np.bool_)
    inner = range(1, side - 1 - (side % 2 == 0), 2)
    trail = [(_one(inner, order), _one(inner, order))]
    walls[trail[0]] = False
    while trail:
        row, column = trail[-1]
        steps = ((row - 2, column), (row + 2, column), (row, column - 2), (row, column + 2))
        open_to = [(r, c) for r, c in steps if r in inner and c in inner and walls[r, c]]
        if not open_to:
            trail.pop()
            continue
        r, c = _one(open_to, order)
        walls[r, c] = walls[(row + r) // 2, (column + c) // 2] = False
        trail.append((r, c))
    return walls


def _braid(
    walls: NDArray[np.bool_], start: Cell, goal: Cell, count: int, order: random.Random
) -> None:
    """Take out walls between two cells where the shortest path stays unique."""
    side = len(walls) - (len(walls) % 2 == 0)
    between = [(r, c) for r in range(1, side - 1) for c in range(1, side - 1) if (r + c) % 2]
    standing = [cell for cell in between if walls[cell]]
    for cell in _some(standing, len(standing), order):
        if count == 0:
            return
        walls[cell] = False
        if shortest_path(walls, start, goal)[1] == 1:
            count -= 1
        else:
            walls[cell] = True


def _one(items: Sequence[Any], order: random.Random) -> Any:
    """Choose by ``random()`` alone, whose numbers Python keeps the same for all time."""
    return items[int(order.random() * len(items))]


def _some(items: Sequence[Any], count: int, order: random.Random) -> list[Any]:
    return [item for _, item in sorted((order.random(), item) for item in items)][:count]


def _build(name: str, options: Mapping[str, Any]) -> tuple[Maze, MazeSettings]:
    settings: MazeSettings = settings_from(MazeSettings, options)
    return Maze(int(name.removeprefix("maze")), settings.braid, settings.min_path), settings


register((f"maze{side}" for side in SIDES), _build)
