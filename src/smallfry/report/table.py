"""HTML tables with all text escaped."""

import math
from collections.abc import Collection, Sequence
from html import escape
from typing import Any

NONE = "–"


class Html(str):
    """Trusted markup."""


def table(
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    text: Collection[int] = (0,),
    groups: Sequence[tuple[str, int]] = (),
    marked: Collection[int] = (),
) -> Html:
    """Build a table; cells are escaped unless they are ``Html``.

    Args:
        head: A name for each column.
        rows: Cells, as many as columns.
        text: Columns of words, which are set to the left.
        groups: A line above the head: a name and how many columns it spans.
        marked: Rows that stand out.
    """

    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=text' if i in text else ''}>{_cell(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    above = "".join(f"<th class=group colspan={n}>{escape(name)}</th>" for name, n in groups)
    body = "\n".join(
        f"<tr{' class=chosen' if i in marked else ''}>{cells('td', row)}</tr>"
        for i, row in enumerate(rows)
    )
    return Html(
        f"<div class=wide><table><thead>{f'<tr>{above}</tr>' if above else ''}"
        f"<tr>{cells('th', head)}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def number(value: Any, digits: int = 3) -> str:
    """Format a figure with that many digits, without an exponent where readable."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if value and 1e-4 <= abs(value) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{places}f}"
    return f"{value:.{digits}g}"


def _cell(value: Any) -> str:
    return value if isinstance(value, Html) else escape(str(value))
