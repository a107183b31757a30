"""Symmetries of grids of symbols: a permutation of the cells and a renaming of the symbols."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Symmetry"]


class Symmetry(NamedTuple):
    """One symmetry for each of several grids."""

    cells: Tensor  # (grids, cells), int64: where each new cell comes from
    symbols: Tensor  # (grids, symbols), int64: the new number of each symbol

    def __call__(self, grids: Tensor) -> Tensor:
        """Transform grids (grids, ..., cells) of symbols' numbers, keeping their type."""
        shape = (len(grids), *(1 for _ in grids.shape[1:-1]), -1)
        moved = grids.long().gather(-1, self.cells.view(shape).expand_as(grids))
        flat = moved.flatten(1)
        return self.symbols.gather(1, flat).view_as(moved).to(grids.dtype)

    def take(self, rows: Tensor) -> "Symmetry":
        """Select the symmetries of some grids."""
        return Symmetry(self.cells[rows], self.symbols[rows])
