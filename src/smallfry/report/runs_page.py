"""Page of a study of training runs: its sections, every run, and provenance."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from smallfry.io.json import strict
from smallfry.report.page import render, words, write
from smallfry.report.runs import Outcome, protocol, runs_table
from smallfry.report.table import table


class Section(NamedTuple):
    """Section of a page, with its part of the summary.

    ``html`` are its parts: ``Markup``, or the text of a paragraph.
    """

    title: str
    html: Sequence[str]
    measured: Any
    reported: Any = None


def write_page(
    title: str, about: str, sections: Sequence[Section], outcomes: Sequence[Outcome], planned: int
) -> tuple[str, dict[str, Any]]:
    """Build the page and its summary.

    Args:
        title: Title of the page.
        about: Question of the study, and notes for readers.
        sections: In their order.
        outcomes: The runs that have ended.
        planned: Number of planned runs.
    """
    failures = [[o.name, o.failure] for o in outcomes if o.failure is not None]
    html = render(
        "report/templates/runs.html",
        title=title,
        about=about,
        outcomes=outcomes,
        planned=planned,
        failures=failures,
        failed=table(["run", "what it said"], failures, text=(0, 1)),
        protocol=protocol(outcomes),
        test_images=_test_images(outcomes),
        sections=sections,
        runs=runs_table(outcomes),
        provenance=_provenance(outcomes),
    )
    summary = {
        "title": title,
        "planned": planned,
        "protocol": protocol(outcomes),
        "measured": {s.title: s.measured for s in sections},
        "reported": {s.title: s.reported for s in sections if s.reported is not None},
        "runs": [_told(o) for o in outcomes],
    }
    return html, summary


def save_page(folder: Path, page: str, summary: Mapping[str, Any]) -> Path:
    """Write ``report.html`` and ``summary.json``; return the page."""
    text = json.dumps(strict(summary), indent=1, allow_nan=False)
    write(folder / "summary.json", text + "\n")
    write(folder / "report.html", page)
    return folder / "report.html"


def _test_images(outcomes: Sequence[Outcome]) -> list[int]:
    """List the different numbers of test images, the fewest first."""
    return sorted({(o.summary or {}).get("data", {}).get("test") for o in outcomes} - {None})


def _told(outcome: Outcome) -> dict[str, Any]:
    summary = outcome.summary or {}
    return {
        "name": outcome.name,
        "facts": outcome.facts,
        "failure": outcome.failure,
        "selected_percent": outcome.selected,
        "measured": summary.get("measured"),
        "model": summary.get("model"),
        "data": summary.get("data"),
        "provenance": summary.get("provenance"),
    }


def _provenance(outcomes: Sequence[Outcome]) -> Markup | None:
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        origin = (outcome.summary or {}).get("provenance") or {}
        for name in ("command", "commit", "device", "versions"):
            if origin.get(name) is not None:
                counts[name, words(origin[name])] += 1
        if origin.get("date"):
            counts["day", str(origin["date"])[:10]] += 1
    if not counts:
        return None
    rows = [[name, value, count] for (name, value), count in sorted(counts.items())]
    return table(["what", "value", "runs"], rows, text=(0, 1))
