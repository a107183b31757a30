"""Puzzles on grids: a symbol in every cell, stable-max cross-entropy, whole puzzles and cells.

Stable-max replaces exp by s(x) = x + 1 for x >= 0 and 1 / (1 - x) below. As log s(x) is
sign(x) log(1 + abs(x)), it is the softmax of logits that are compressed so.

Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697; as the loss
of TRM: Jolicoeur-Martineau, arXiv 2510.04871.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.curvature.stablemax import log_stable
from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults, share_of
from smallfry_runtime.decoders import puzzle as decoders
from smallfry_runtime.decoders.puzzle import PADDING

__all__ = ["Puzzle", "log_stablemax"]


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
        """Mark the puzzles with all labelled cells right, if they have some."""
        found = (_hits(outputs, targets) | (targets == PADDING)).all(dim=1)
        return found & self.judged(targets)

    def judged(self, targets: Tensor) -> Tensor:
        """Mark the puzzles with a labelled cell."""
        return (targets != PADDING).any(dim=1)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute the loss, the share of whole puzzles that are right, and that of cells."""
        return {
            "loss": self.loss(outputs, labels).item(),
            "accuracy": share_of(self.right(outputs, labels), self.judged(labels)),
            "cell_accuracy": share_of(_hits(outputs, labels), labels != PADDING),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by whole puzzles, then by cells, then by loss."""
        return scores["accuracy"], scores["cell_accuracy"], -scores["loss"]

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Return the rows of each solution, as text.

        Raises:
            UsageError: There are settings, and it has none.
        """
        return decoders.decode(outputs.numpy(), classes, settings)

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
        """Read the puzzles of a file, (puzzles, 1, side, side), uint8.

        Raises:
            DataError: A puzzle of another size, or with an unknown symbol.
        """
        return torch.from_numpy(decoders.read(text, classes, side))


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


def _hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mark the cells whose likeliest symbol is the target, (puzzles, cells)."""
    return outputs.argmax(dim=-1) == targets
