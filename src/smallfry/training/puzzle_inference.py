"""Predictions of a recursive model on puzzles of a text file, step by step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.tasks import ReadsText
from smallfry.training.evaluation import task_of
from smallfry.training.run import TrainedModel
from smallfry_runtime.decoders.puzzle import text_of_grid

__all__ = ["PuzzleStep", "Solved", "solve"]

AT_ONCE = 64  # puzzles


class PuzzleStep(NamedTuple):
    """Answer after a recursion step."""

    answer: list[str]  # its rows
    halting: float  # probability that it is right, by the model itself


class Solved(NamedTuple):
    """Puzzle with the answers to it."""

    given: list[str]  # its rows
    steps: list[PuzzleStep]  # up to the one at which it left the recursion

    def to_dict(self) -> dict[str, object]:
        """Convert to plain values for JSON."""
        steps = [step._asdict() for step in self.steps]
        return {"given": self.given, "answer": self.steps[-1].answer, "steps": steps}


def solve(
    trained: TrainedModel, text: str, exit_threshold: float | None = None
) -> Iterator[Solved]:
    """Yield the puzzles of a file's text with the answer after every recursion step.

    Args:
        trained: The model.
        text: The file's text.
        exit_threshold: Halting probability at which a puzzle leaves the recursion.

    Raises:
        DataError: Text of another form.
        UsageError: The model does not solve puzzles, or does not recur.
    """
    task, model = task_of(trained.manifest), trained.model
    if not isinstance(task, ReadsText) or not isinstance(model, Recursive):
        raise UsageError(
            "only a recursive model for puzzles reads text: train one with --task puzzle"
        )
    grids = task.read(text, trained.classes, trained.frame.height)
    for batch in torch.split(grids, AT_ONCE):
        with torch.inference_mode():
            steps = model.recurse(trained.normalize(batch))
        answers = torch.stack([step.logits.argmax(-1) for step in steps], dim=1).tolist()
        halting = torch.stack([step.halt_logits.sigmoid() for step in steps], dim=1).tolist()
        for grid, rows, chances in zip(batch.flatten(1).tolist(), answers, halting, strict=True):
            found = []
            for row, chance in zip(rows, chances, strict=True):
                found.append(PuzzleStep(text_of_grid(row, trained.classes), chance))
                if exit_threshold is not None and chance >= exit_threshold:
                    break
            yield Solved(text_of_grid(grid, trained.classes), found)
