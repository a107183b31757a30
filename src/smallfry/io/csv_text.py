"""CSV for spreadsheets, without formulas in cells of text."""

import csv
from collections.abc import Iterable, Sequence
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # how formulas begin


def harmless(cell: Any) -> Any:
    """Put an apostrophe before text that a spreadsheet would run as a formula.

    Example:
        >>> harmless("=1+1"), harmless("cat"), harmless(-0.5)
        ("'=1+1", 'cat', -0.5)
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Format rows as CSV with ``harmless`` cells; numbers have all their digits."""
    lines: list[str] = []
    writer = csv.writer(_Lines(lines))  # which ends them by \r\n, and so quotes a lone \r
    writer.writerows([harmless(cell) for cell in row] for row in rows)
    return "".join(f"{line[:-2]}\n" for line in lines)


class _Lines:
    """Stream whose writes are lines."""

    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append
