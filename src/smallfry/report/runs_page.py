"""Page of a study of training runs: its sections, every run, and provenance."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from smallfry.io.json import strict
from smallfry.report.page import page_of, words, write
from smallfry.report.runs import Outcome, protocol, runs_table
from smallfry.report.table import Html, table


class Section(NamedTuple):
    """Section of a page, with its part of the summary."""

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
    failed = [o for o in outcomes if o.failure is not None]
    done = f"{len(outcomes)} of {planned} runs have ended, {len(failed)} of them failed."
    body = [f"<h1>{escape(title)}</h1>", f"<p>{about}</p>"]
    done += f" Protocol of what is measured here: {protocol(outcomes)}. {_grain(outcomes)}"
    body.append(f"<p>{escape(done)}</p>")
    for section in sections:
        body += [f"<h2>{escape(section.title)}</h2>", *section.html]
    if failed:
        body.append("<h2>Failed runs</h2>")
        rows = [[o.name, o.failure] for o in failed]
        body.append(table(["run", "what it said"], rows, text=(0, 1)))
    body.append("<h2>Every run</h2>")
    body.append(
        "<p>A run's folder is <code>runs/NAME</code> beside this page; <code>smallfry train "
        "--config runs/NAME/config.yaml --run OTHER</code> makes it again.</p>"
    )
    body += [runs_table(outcomes), "<h2>Provenance</h2>", _provenance(outcomes)]
    summary = {
        "title": title,
        "planned": planned,
        "protocol": protocol(outcomes),
        "measured": {s.title: s.measured for s in sections},
        "reported": {s.title: s.reported for s in sections if s.reported is not None},
        "runs": [_told(o) for o in outcomes],
    }
    return page_of(title, body), summary


def save_page(folder: Path, page: str, summary: Mapping[str, Any]) -> Path:
    """Write ``report.html`` and ``summary.json``; return the page."""
    text = json.dumps(strict(summary), indent=1, allow_nan=False)
    write(folder / "summary.json", text + "\n")
    write(folder / "report.html", page)
    return folder / "report.html"


def _grain(outcomes: Sequence[Outcome]) -> str:
    """Describe the change in accuracy from a single test image."""
    counts = {(o.summary or {}).get("data", {}).get("test") for o in outcomes} - {None}
    return " ".join(f"One of {n:,} test images is {100 / n:.2g} points." for n in sorted(counts))


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


def _provenance(outcomes: Sequence[Outcome]) -> Html:
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        origin = (outcome.summary or {}).get("provenance") or {}
        for name in ("command", "commit", "device", "versions"):
            if origin.get(name) is not None:
                counts[name, words(origin[name])] += 1
        if origin.get("date"):
            counts["day", str(origin["date"])[:10]] += 1
    if not counts:
        return Html("<p>Unknown.</p>")
    rows = [[name, value, count] for (name, value), count in sorted(counts.items())]
    return table(["what", "value", "runs"], rows, text=(0, 1))
