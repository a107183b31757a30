"""Report of an optimizer race: plots, a JSON summary and an HTML page.

The page holds its pictures, and has neither scripts nor requests; its structure and words are
in ``templates/race.html``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smallfry.io.json import strict
from smallfry.report.page import image, render, words, write
from smallfry.report.race_pictures import (
    MOST_LAYERS,
    Look,
    Panel,
    draw_fisher,
    draw_losses,
    draw_tuning,
    looks,
)
from smallfry.report.race_tables import (
    cost_table,
    fisher_table,
    reported_table,
    time_table,
    tuning_table,
)
from smallfry.report.races import (
    FULL,
    Record,
    choose_targets,
    fisher,
    layers,
    problems,
    select,
    summarize,
    times,
    tuning,
)
from smallfry.report.table import table

PICTURES = {
    "training": [Panel("train", "step"), Panel("train", "epoch"), Panel("train", "seconds")],
    "validation": [
        Panel("validation", "seconds"),
        Panel("train", "seconds", closely=True),
        Panel("validation", "seconds", closely=True),
    ],
}
CLOCKS = {"cpu": "CPU time", "wall": "wall time"}


class Part(NamedTuple):
    """Section of the page: what its template shows, and its part of the summary."""

    shown: Any
    summary: Any


def write_report(
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    title: str,
    reported: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write ``pictures/``, ``summary.json`` and ``report.html`` of the results so far.

    Args:
        records: The lines of ``trials.jsonl``; any of them may be missing.
        folder: The study's folder.
        title: Title of the page.
        reported: Figures of papers, by contestant and column.

    Returns:
        The page.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    shown = looks(records)
    rows = summarize(records)
    sections = {}
    for number, problem in enumerate(problems(records), start=1):
        name = re.sub(r"[^a-z0-9]+", "-", problem.lower()).strip("-")[:40]
        stem = f"{number}-{name}"  # the number distinguishes problems of one name
        parts = {phase: _race(records, problem, phase, shown, pictures / stem) for phase in FULL}
        parts["tuning"] = _tuning(records, problem, shown, pictures / stem)
        parts["fisher"] = _fisher(records, problem, shown, pictures / stem)
        sections[problem] = {name: part for name, part in parts.items() if part}
    provenance = _provenance(records)
    summary = {
        "title": title,
        "problems": {
            problem: {name: part.summary for name, part in found.items()}
            for problem, found in sections.items()
        },
        "reported": reported,
        "provenance": provenance.summary,
    }
    write(folder / "summary.json", json.dumps(strict(summary), indent=1, allow_nan=False) + "\n")
    page = folder / "report.html"
    theirs = reported_table(reported, rows) if reported else None
    given = {"title": title, "sections": sections, "provenance": provenance.shown}
    write(page, render("report/templates/race.html", **given, reported=theirs))
    return page


def _race(
    records: Sequence[Record], problem: str, phase: str, shown: Mapping[str, Look], stem: Path
) -> Part | None:
    race = select(records, problem, phase)
    if not race:
        return None
    rows = summarize(race)
    targets = choose_targets(rows)
    reaches = times(race, rows)
    clock = _clock(race)
    pictures = []
    for what, panels in PICTURES.items():
        file = stem.with_name(f"{stem.name}-{phase}-{what}.png")
        draw_losses(race, rows, panels, shown, clock, file)
        pictures.append(image(file, f"{what}, {problem}, {phase}"))
    about = {
        "budgets": _budgets(race),
        "clock": clock,
        "clocks_differ": len({r.get("clock") for r in race}) > 1,
        "end": f"{rows[0].end:.4g}",
        "pictures": pictures,
        "costs": cost_table(rows, shown),
        "times": time_table(reaches, targets, shown) if targets else None,
    }
    return Part(about, {"rows": rows, "targets": targets, "times": reaches})


def _tuning(
    records: Sequence[Record], problem: str, shown: Mapping[str, Look], stem: Path
) -> Part | None:
    trials = tuning(records, problem)
    if not trials:
        return None
    file = stem.with_name(f"{stem.name}-tuning.png")
    draw_tuning(trials, shown, file)
    race = select(records, problem, "tuning")
    about = {
        "count": len(trials),
        "budgets": _budgets(race),
        "clock": _clock(race),
        "picture": image(file, f"tuning, {problem}"),
        "trials": tuning_table(trials, shown),
    }
    return Part(about, trials)


def _fisher(
    records: Sequence[Record], problem: str, shown: Mapping[str, Look], stem: Path
) -> Part | None:
    errors = fisher(records, problem)
    if not errors:
        return None
    file = stem.with_name(f"{stem.name}-fisher.png")
    draw_fisher(errors, shown, file)
    about = {
        "layers": len(layers(errors)),
        "drawn": MOST_LAYERS,
        "picture": image(file, f"Fisher errors, {problem}"),
        "errors": fisher_table(errors, shown),
    }
    return Part(about, errors)


def _provenance(records: Sequence[Record]) -> Part:
    found: dict[str, dict[str, int]] = {}
    for record in records:
        provenance = record.get("provenance") or {}
        facts = {name: provenance.get(name) for name in ("command", "commit", "device")}
        facts |= {"clock": record.get("clock"), "versions": provenance.get("versions")}
        for name, value in facts.items():
            if value is not None:
                counts = found.setdefault(name, {})
                counts[words(value)] = counts.get(words(value), 0) + 1
    dates = sorted(str(d) for r in records if (d := (r.get("provenance") or {}).get("date")))
    rows: list[list[Any]] = [
        [name, value, count] for name, counts in found.items() for value, count in counts.items()
    ]
    if dates:
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        rows.append(["dates", span, len(dates)])
    shown = table(["what", "value", "runs"], rows, text=(0, 1)) if rows else None
    return Part(shown, {**found, "dates": [dates[0], dates[-1]] if dates else []})


def _budgets(records: Sequence[Record]) -> list[str]:
    """List the different budgets of runs in seconds, the shortest first."""
    found = {float(r["seconds"]) for r in records if r.get("seconds") is not None}
    return [f"{seconds:g}" for seconds in sorted(found)]


def _clock(records: Sequence[Record]) -> str:
    names = {str(record.get("clock")) for record in records}
    return " and ".join(sorted(CLOCKS.get(name, "an unknown clock") for name in names))
