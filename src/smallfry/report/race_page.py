"""Report of an optimizer race: plots, a JSON summary and an HTML page.

The page holds its pictures, runs nothing and asks nothing of the net; all text of records is
escaped.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from smallfry.io.json import strict
from smallfry.report.page import image, page_of, words, write
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
from smallfry.report.table import Html, table

TITLES = {
    "tuned": "Tuned: the best setting of each, run in full",
    "defaults": "Defaults: every optimizer as it comes, run in full",
}
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
    """Section of the page, with its part of the summary."""

    html: str
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
        stem = f"{number}-{name}"  # the number tells apart what reads the same
        parts = {phase: _race(records, problem, phase, shown, pictures / stem) for phase in FULL}
        parts["tuning"] = _tuning(records, problem, shown, pictures / stem)
        parts["fisher"] = _fisher(records, problem, shown, pictures / stem)
        sections[problem] = {name: part for name, part in parts.items() if part}
    provenance = _provenance(records)
    body = [f"<h1>{escape(title)}</h1>"]
    if not records:
        body.append("<p>No run has finished yet.</p>")
    if len(sections) > 1:
        links = [f'<a href="#p{i}">{escape(name)}</a>' for i, name in enumerate(sections)]
        body.append(f"<nav>{''.join(links)}</nav>")
    for i, (problem, found) in enumerate(sections.items()):
        body.append(f'<h2 id="p{i}">{escape(problem)}</h2>')
        body += [part.html for part in found.values()]
    if reported:
        body.append("<h2>Reported by the papers</h2>")
        body.append(
            "<p>The papers' figures are of their machines, budgets and units; the columns "
            "measured here are the training losses of the tables above.</p>"
        )
        body.append(reported_table(reported, rows))
    body += ["<h2>Provenance</h2>", provenance.html]
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
    write(page, page_of(title, body))
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
    html = [f"<h3>{TITLES[phase]}</h3>", f"<p>{_compared(race, rows[0].end, clock)}</p>"]
    for what, panels in PICTURES.items():
        file = stem.with_name(f"{stem.name}-{phase}-{what}.png")
        draw_losses(race, rows, panels, shown, clock, file)
        html.append(image(file, f"{what}, {problem}, {phase}"))
    html.append(cost_table(rows, shown))
    html.append("<h4>Time to reach a training loss</h4>")
    html.append(
        "<p>The targets are the final training losses that three quarters, half and a quarter of "
        "the contestants that have one reached, rounded up to two digits, or to as many more as "
        "it takes to tell the three apart. Seconds are the median over seeds, interpolated "
        "between measured points in the logarithm of the loss; – where at least half of the "
        "seeds did not get there by the common end. Ratios below 1 are faster.</p>"
        if targets
        else "<p>No run got below the loss it started from, so there is no target.</p>"
    )
    html.append(time_table(reaches, targets, shown) if targets else "")
    return Part("\n".join(html), {"rows": rows, "targets": targets, "times": reaches})


def _compared(race: Sequence[Record], end: float, clock: str) -> str:
    budgets = sorted({float(r["seconds"]) for r in race if r.get("seconds") is not None})
    text = f"Every run had {' or '.join(f'{b:g}' for b in budgets) or '?'} seconds of {clock}. "
    if len(budgets) > 1:
        text += "<b>The budgets differ, so runs are compared at the end of the shortest.</b> "
    if len({r.get("clock") for r in race}) > 1:
        text += "<b>The clocks differ; these seconds can't be compared.</b> "
    return (
        text + f"Losses are compared at {end:.4g} s, the last second that all runs got to "
        "(not counting those that diverged or ended before half). Lines are medians over seeds, "
        "bands the range of the seeds that are still finite; × marks where half of the seeds have "
        "diverged. The second half is scaled to the best three quarters of the contestants. A "
        "diverged run counts as infinite; – stands for an infinite or unknown figure."
    )


def _tuning(
    records: Sequence[Record], problem: str, shown: Mapping[str, Look], stem: Path
) -> Part | None:
    trials = tuning(records, problem)
    if not trials:
        return None
    file = stem.with_name(f"{stem.name}-tuning.png")
    draw_tuning(trials, shown, file)
    race = select(records, problem, "tuning")
    budgets = sorted({float(r["seconds"]) for r in race if r.get("seconds") is not None})
    spent = " or ".join(f"{budget:g}" for budget in budgets) or "?"
    html = [
        "<h3>Tuning</h3>",
        f"<p>{len(trials)} trials of {spent} seconds of {_clock(race)}, judged by the validation "
        "loss at their end. The chosen setting is that of the full runs; where there are none "
        "yet, the best so far.</p>",
        image(file, f"tuning, {problem}"),
        f"<details><summary>All trials</summary>{tuning_table(trials, shown)}</details>",
    ]
    return Part("\n".join(html), trials)


def _fisher(
    records: Sequence[Record], problem: str, shown: Mapping[str, Look], stem: Path
) -> Part | None:
    errors = fisher(records, problem)
    if not errors:
        return None
    file = stem.with_name(f"{stem.name}-fisher.png")
    draw_fisher(errors, shown, file)
    count = len(layers(errors))
    html = [
        "<h3>How near the Fisher matrix is</h3>",
        "<p>Relative error in the Frobenius norm of each contestant's approximation, layer by "
        "layer, along one trajectory that AdamW trained; the table has the median over steps."
        + (f" Of {count} layers, {MOST_LAYERS} are drawn." if count > MOST_LAYERS else "")
        + "</p>",
        image(file, f"Fisher errors, {problem}"),
        fisher_table(errors, shown),
    ]
    return Part("\n".join(html), errors)


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
    html = table(["what", "value", "runs"], rows, text=(0, 1)) if rows else Html("<p>Unknown.</p>")
    return Part(html, {**found, "dates": [dates[0], dates[-1]] if dates else []})


def _clock(records: Sequence[Record]) -> str:
    names = {str(record.get("clock")) for record in records}
    return " and ".join(sorted(CLOCKS.get(name, "an unknown clock") for name in names))
