"""Puzzles in the demo: the answer of a recursive model after each improvement step."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image, ImageDraw

from smallfry.data import Split
from smallfry.demo.examples import WANTED, Example
from smallfry.errors import DataError, SmallfryError
from smallfry.models import Recursive
from smallfry.report.page import render
from smallfry.tasks import ReadsText
from smallfry.training.evaluation import task_of
from smallfry.training.evaluation_data import load_like
from smallfry.training.puzzle_inference import Solved, solve
from smallfry.training.run import TrainedModel
from smallfry_runtime.decoders.puzzle import text_of_grid

__all__ = ["find_puzzles", "panel_of", "solves_puzzles", "views_of"]

OPEN = "."
CELL = 12  # pixels of a cell of an example's picture
TRIED = 64  # test puzzles, of which the examples are chosen
GIVEN, PLAIN, INK = "#d1d5db", "#ffffff", "#111827"


def solves_puzzles(trained: TrainedModel) -> bool:
    """Return whether a model reads puzzles as text."""
    return isinstance(task_of(trained.manifest), ReadsText) and isinstance(trained.model, Recursive)


def panel_of(trained: TrainedModel, file: bytes, name: str) -> dict[str, Any]:
    """Solve the first puzzle of a text file; the moments are the puzzle and all steps.

    Args:
        trained: The model.
        file: Text, as ``smallfry predict`` reads it.
        name: Of the file, for errors.

    Raises:
        DataError: No text, or of another form.
    """
    try:
        solved = next(solve(trained, file.decode()))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is no text; expected a puzzle's rows of symbols") from error
    except StopIteration:
        raise DataError(f"{name}: holds no puzzle") from None
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return {"answer": len(solved.steps), "picture": "", "views": views_of(solved)}


def views_of(solved: Solved) -> list[str]:
    """Render the puzzle, and the answer after each step with the cells that it changed."""
    views: list[str] = []
    before, steps = solved.given, [None, *solved.steps]
    for number, step in enumerate(steps):
        rows = solved.given if step is None else step.answer
        cells = [
            [
                (symbol, "given" if given != OPEN else "new" if symbol != old else "")
                for given, old, symbol in zip(*each, strict=True)
            ]
            for each in zip(solved.given, before, rows, strict=True)
        ]
        changed = sum(kind == "new" for row in cells for _, kind in row)
        views.append(
            render(
                "demo/templates/puzzle.html",
                cells=cells,
                step=number,
                steps=len(solved.steps),
                halting=None if step is None else step.halting,
                changed=changed,
            )
        )
        before = rows
    return views


def find_puzzles(trained: TrainedModel, run: str) -> list[Example]:
    """Find the test puzzles on which the later steps change most; none without generated data.

    Args:
        trained: The model.
        run: Its run folder.
    """
    if "generated" not in trained.manifest.get("data", {}):
        return []
    try:
        _, split, _ = load_like(trained, run)
    except SmallfryError:  # such as a checkpoint without its run folder
        return []
    chosen = split.take(torch.arange(min(TRIED, len(split))))
    order = _changes(trained, chosen).argsort(descending=True, stable=True)[:WANTED]
    examples = []
    for i in order.tolist():
        rows = text_of_grid(chosen.images[i].flatten().tolist(), trained.classes)
        text = "\n".join(rows)
        examples.append(Example(f"test puzzle {i}", picture(rows), text.encode()))
    return examples


@torch.inference_mode()
def _changes(trained: TrainedModel, split: Split) -> torch.Tensor:
    """Count the cells of each puzzle that differ between the first and the last step."""
    model = trained.model
    assert isinstance(model, Recursive)
    steps = model.recurse(trained.normalize(split.images))
    first, last = (steps[i].logits.argmax(-1) for i in (0, -1))
    return (first != last).sum(1)


def picture(rows: Sequence[str]) -> bytes:
    """Draw a puzzle as a PNG, givens grey."""
    side = len(rows)
    image = Image.new("RGB", (side * CELL + 1,) * 2, PLAIN)
    draw = ImageDraw.Draw(image)
    for line, row in enumerate(rows):
        for column, symbol in enumerate(row):
            x, y = column * CELL, line * CELL
            colour = PLAIN if symbol == OPEN else GIVEN
            draw.rectangle((x, y, x + CELL, y + CELL), fill=colour, outline=INK)
            if symbol != OPEN:
                draw.text((x + CELL / 2, y + CELL / 2), symbol, fill=INK, anchor="mm")
    file = BytesIO()
    image.save(file, "png")
    return file.getvalue()
