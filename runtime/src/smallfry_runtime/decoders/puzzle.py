"""Puzzles on grids of symbols: text in, and text out."""

import json
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import require_no_settings
from smallfry_runtime.errors import DataError

__all__ = ["PADDING", "decode", "puzzle_texts", "read", "right", "text_of_grid"]

OPEN = ("0", "_", " ", "-")  # how files write an open cell besides "."
MOST_PUZZLES = 10_000  # of a file
PADDING = 0  # the symbol of cells outside a grid, which are not labelled


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (puzzles, cells, symbols) to the rows of each solution, as text.

    Raises:
        UsageError: There are settings, and it has none.
    """
    require_no_settings(settings)
    return [text_of_grid(row, classes) for row in outputs.argmax(axis=-1).tolist()]


def right(outputs: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the puzzles (puzzles,) with all labelled cells right, and one at least.

    Args:
        outputs: (puzzles, cells, symbols).
        labels: (puzzles, cells).
    """
    found = (outputs.argmax(axis=-1) == labels) | (labels == PADDING)
    return np.asarray(found.all(axis=1) & (labels != PADDING).any(axis=1))


def read(text: str, classes: Sequence[str], side: int) -> NDArray[np.uint8]:
    """Read the puzzles of a file, (puzzles, 1, side, side); see ``puzzle_texts``.

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
    return np.array(grids, np.uint8).reshape(-1, 1, side, side)


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
        return _flattened(json.loads(content), side)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); a puzzle is {side} lines of {side} symbols") from None


def _flattened(found: Any, side: int) -> list[str]:
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


def text_of_grid(symbols: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Return the lines of a grid of symbols' numbers, row by row."""
    side = isqrt(len(symbols))
    names = [classes[number] for number in symbols]
    return ["".join(names[row * side : (row + 1) * side]) for row in range(side)]
