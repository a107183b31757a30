"""Puzzles on grids: a symbol in every cell, stable-max cross-entropy, whole puzzles and cells.

Stable-max replaces exp by s(x) = x + 1 for x >= 0 and 1 / (1 - x) below. As log s(x) is
sign(x) log(1 + abs(x)), it is the softmax of logits that are compressed so.

Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697; as the loss
of TRM: Jolicoeur-Martineau, arXiv 2510.04871.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.curvature.stablemax import log_stable
from smallfry.data import Split
from smallfry.errors import DataError, UsageError
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults

__all__ = ["Puzzle", "log_stablemax", "puzzle_texts"]

PADDING = 0  # the symbol of cells outside a grid, which are not labelled
OPEN = ("0", "_", " ", "-")  # how files write an open cell besides "."
MOST_PUZZLES = 10_000  # of a file


@register
@dataclass(frozen=True)
class Puzzle:
    """Filling in a grid: logits (puzzles, cells, symbols), labels (puzzles, cells).

    The loss is a mean over the cells of a puzzle, then over puzzles. Givens count like other cells.
    """

    name: ClassVar[str] = "puzzle"
    likelihood: ClassVar[str] = "stablemax_mean"
    defaults: ClassVar[TaskDefaults] = TaskDefaults(
        {4: "trm_sudoku4_micro", 6: "trm_sudoku6_micro", 9: "trm_sudoku9_mlp"},
        "trm_maze30",
        "slots",
    )
    scored_by_step: ClassVar[bool] = True

    @classmethod
    def create(cls, label_smoothing: float = 0.0) -> "Puzzle":
        """Create the task from ``ObjectiveConfig``.

        Raises:
            UsageError: Label smoothing, which it does not have.
        """
        if label_smoothing:
            raise UsageError("puzzles have one right symbol in a cell: leave out label_smoothing")
        return cls()

    def outputs(self, classes: int) -> int:
        """Return the number of symbols."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the labels (puzzles, cells).

        Raises:
            UsageError: The data has one label for an image, not one for a cell.
        """
        if labels.ndim != 2:
            raise UsageError(
                "the task puzzle needs grids with a label in each cell: name generated puzzles, "
                "such as data.name sudoku6"
            )
        return labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean stable-max cross-entropy."""
        return cell_losses(outputs, targets).mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mark the puzzles with all labelled cells right."""
        return (_hits(outputs, targets) | (targets == PADDING)).all(dim=1)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute the loss, the share of whole puzzles that are right, and that of cells."""
        cells = _hits(outputs, labels)[labels != PADDING]
        return {
            "loss": self.loss(outputs, labels).item(),
            "accuracy": self.right(outputs, labels).double().mean().item(),
            "cell_accuracy": cells.double().mean().item(),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by whole puzzles, then by cells, then by loss."""
        return scores["accuracy"], scores["cell_accuracy"], -scores["loss"]

    def decode(self, outputs: Tensor) -> list[Any]:
        """Return the number of the likeliest symbol in each cell."""
        symbols: list[Any] = outputs.argmax(dim=-1).tolist()
        return symbols

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw a few puzzles with the prediction, its wrong cells marked."""
        from smallfry.report.puzzles import draw_puzzles

        wrong = (~self.right(outputs, split.labels)).nonzero()[:, 0]
        others = self.right(outputs, split.labels).nonzero()[:, 0]
        chosen = torch.cat([wrong[:4], others])[:8]
        shown = split.take(chosen)
        answers = outputs[chosen].argmax(dim=-1)
        draw_puzzles(shown.images[:, 0], shown.labels, answers, classes, folder / "puzzles.png")

    def read(self, text: str, classes: Sequence[str], side: int) -> Tensor:
        """Read the puzzles of a file, (puzzles, 1, side, side), uint8; see ``puzzle_texts``.

        Raises:
            DataError: A puzzle of another size, or with an unknown symbol.
        """
        numbers = {symbol: number for number, symbol in enumerate(classes)}
        numbers |= {each: numbers["."] for each in OPEN if "." in numbers}
        grids = []
        for position, puzzle in enumerate(puzzle_texts(text, side), 1):
            unknown = sorted(set(puzzle) - set(numbers))
            if unknown:
                raise DataError(
                    f"puzzle {position}: unknown symbol {unknown[0]!r}; expected "
                    f"{' '.join(classes[1:])}"
                )
            grids.append([numbers[symbol] for symbol in puzzle])
        return torch.tensor(grids, dtype=torch.uint8).view(-1, 1, side, side)


def log_stablemax(logits: Tensor) -> Tensor:
    """Compute logarithms of stable-max probabilities, along the last dimension."""
    return log_stable(logits).log_softmax(dim=-1)


def cell_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean loss over the labelled cells of each puzzle, (puzzles,).

    Args:
        outputs: Logits (puzzles, cells, symbols).
        targets: Symbols (puzzles, cells), int64.
    """
    precise = outputs if outputs.device.type == "mps" else outputs.double()
    found = F.nll_loss(
        log_stablemax(precise).flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)
    labelled = targets != PADDING
    return (found * labelled).sum(1) / labelled.sum(1).clamp(min=1)


def puzzle_texts(text: str, side: int) -> list[str]:
    """Split the text of a file into puzzles of side² symbols each, row by row.

    A puzzle is one line of side² symbols, or ``side`` lines of ``side``; lines that begin with ";"
    are comments. JSON is a list of such texts, or of rows of symbols or numbers, or one of them.

    Raises:
        DataError: No puzzle, too many, or one of another size.
    """
    content = text.strip("\n\r")
    if content.lstrip()[:1] in ("[", "{", '"'):
        found = _of_json(content, side)
    else:
        lines = [line.rstrip("\r") for line in content.split("\n") if not line.startswith(";")]
        found, rows = [], list[str]()
        for line in lines:
            if len(line) == side * side and not rows and side > 1:
                found.append(line)
            elif line.strip() or (rows and len(line) == side):
                rows.append(line)
                if len(rows) == side:
                    found.append("".join(rows))
                    rows = []
            elif rows:
                raise DataError(f"puzzle {len(found) + 1}: {len(rows)} lines, expected {side}")
        if rows:
            found.append("".join(rows))
    for position, puzzle in enumerate(found, 1):
        if len(puzzle) != side * side:
            raise DataError(
                f"puzzle {position}: {len(puzzle)} symbols, and the model takes {side}×{side} = "
                f"{side * side}"
            )
    if not 1 <= len(found) <= MOST_PUZZLES:
        raise DataError(f"{len(found):,} puzzles: expected 1 to {MOST_PUZZLES:,}")
    return found


def _of_json(content: str, side: int) -> list[str]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); a puzzle is {side} lines of {side} symbols") from None
    if isinstance(found, dict):
        found = found.get("puzzles", found.get("puzzle"))
    if isinstance(found, str):
        return ["".join(found.split("\n"))]
    if not isinstance(found, list):
        raise DataError('expected a list of puzzles, or {"puzzles": [...]}')
    if len(found) == side and all(_is_row(row, side) for row in found):
        return [_flat(found)]
    return [_flat(puzzle) for puzzle in found]


def _is_row(row: Any, side: int) -> bool:
    return isinstance(row, str | list) and len(_flat(row)) == side


def _flat(value: Any) -> str:
    """Join nested lists of symbols and numbers."""
    if isinstance(value, list):
        return "".join(map(_flat, value))
    return str(value).replace("\n", "")


def _hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mark the cells whose likeliest symbol is the target, (puzzles, cells)."""
    return outputs.argmax(dim=-1) == targets


def text_of_grid(symbols: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Return the lines of a grid of symbols' numbers, row by row."""
    side = isqrt(len(symbols))
    names = [classes[number] for number in symbols]
    return ["".join(names[row * side : (row + 1) * side]) for row in range(side)]
