"""HTML tables with all text escaped."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from markupsafe import Markup

from smallfry.report.page import render

NONE = "–"


def table(
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    text: Collection[int] = (0,),
    groups: Sequence[tuple[str, int]] = (),
    marked: Collection[int] = (),
) -> Markup:
    """Build a table; cells are escaped unless they are ``Markup``.

    Args:
        head: A name for each column.
        rows: Cells, as many as columns.
        text: Columns of words, which are set to the left.
        groups: A line above the head: a name and how many columns it spans.
        marked: Rows that stand out.
    """
    return render(
        "report/templates/table.html", head=head, rows=rows, text=text, groups=groups, marked=marked
    )


def number(value: Any, digits: int = 3) -> str:
    """Format a figure with that many digits, without an exponent where readable; counts whole."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and abs(value) < 1e6:
        return f"{value:,}"
    if value and 1e-4 <= abs(value) < 1e6:
        rounded = abs(float(f"{value:.{digits - 1}e}"))  # 9.999 is 10.0 in three digits
        places = max(0, digits - 1 - math.floor(math.log10(rounded)))
        return f"{value:,.{places}f}"
    return f"{value:.{digits}g}"
