"""Page of an analysis: a section for each question, with findings, pictures and tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from smallfry.report.page import png_url, render, words
from smallfry.report.table import number, table

__all__ = ["Section", "analysis_page"]


class Section(NamedTuple):
    """Section of the page.

    Attributes:
        title: Its heading.
        findings: Sentences.
        pictures: Titles with PNG bytes or SVG.
        tables: Titles with head and rows.
        obstacle: Reason for which the question has no answer; else empty.
    """

    title: str
    findings: Sequence[str] = ()
    pictures: Sequence[tuple[str, bytes | Markup]] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = ()
    obstacle: str = ""


def analysis_page(title: str, sections: Sequence[Section], facts: Mapping[str, Any]) -> str:
    """Build the page, which needs no other files.

    Args:
        title: Its title.
        sections: In order.
        facts: What was analysed, for the table of provenance.
    """
    shown = [
        {
            "title": each.title,
            "obstacle": each.obstacle,
            "findings": each.findings,
            "pictures": [_picture(*picture) for picture in each.pictures],
            "tables": [(name, _table(head, rows)) for name, head, rows in each.tables],
        }
        for each in sections
    ]
    provenance = table(["what", "value"], [[k, words(v)] for k, v in facts.items()], text=(0, 1))
    return render(
        "report/templates/analysis.html", title=title, sections=shown, provenance=provenance
    )


def _picture(title: str, drawing: bytes | Markup) -> dict[str, Any]:
    if isinstance(drawing, bytes):
        image = render("report/templates/image.html", url=Markup(png_url(drawing)), alt=title)
        return {"title": title, "image": image}
    return {"title": title, "image": drawing}


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    texts = [i for i, _ in enumerate(head) if any(isinstance(row[i], str) for row in rows)]
    return table(head, [[number(cell) for cell in row] for row in rows], text=texts)
