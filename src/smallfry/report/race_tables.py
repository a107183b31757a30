"""HTML tables of a race's page, with all text escaped."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from smallfry.report.race_pictures import Look
from smallfry.report.races import FULL, LayerError, Reach, Row, Spread, Trial, layers
from smallfry.report.table import NONE, number, table


def cost_table(rows: Sequence[Row], shown: Mapping[str, Look]) -> Markup:
    """Tabulate final losses and the cost of a step."""
    head = ["", "settings", "training loss", "validation loss", "steps", "plain", "refresh"]
    head += ["mean", "× AdamW", "state / weights", "diverged"]
    cells = [
        [
            _name(row.contestant, row.label, shown),
            " or ".join(map(settings, row.settings)) or NONE,
            spread(row.train),
            spread(row.validation),
            NONE if row.steps is None else f"{row.steps:,.0f}",
            *map(number, (row.plain_ms, row.refresh_ms, row.mean_ms, row.mean_over_adamw)),
            number(row.state_over_weights),
            f"{row.diverged} of {row.seeds}",
        ]
        for row in rows
    ]
    groups = [
        ("", 2),
        ("at the common end, median (range)", 2),
        ("", 1),
        ("ms per step", 4),
        ("", 2),
    ]
    return table(head, cells, text=(0, 1), groups=groups)


def time_table(
    reaches: Sequence[Reach], targets: Sequence[float], shown: Mapping[str, Look]
) -> Markup:
    """Tabulate seconds to each target, with ratios to AdamW and KFAC."""
    cells = []
    for reach in reaches:
        line: list[Any] = [_name(reach.contestant, reach.label, shown)]
        for i in range(len(targets)):
            line += [reach.seconds[i], reach.over_adamw[i], reach.over_kfac[i]]
        cells.append([line[0], *map(number, line[1:])])
    head = ["", *["seconds", "/ AdamW", "/ KFAC"] * len(targets)]
    groups = [("", 1), *((f"training loss {target:.6g}", 3) for target in targets)]
    return table(head, cells, groups=groups)


def tuning_table(trials: Sequence[Trial], shown: Mapping[str, Look]) -> Markup:
    """Tabulate every trial, with the chosen ones highlighted."""
    cells = [
        [
            _name(trial.contestant, trial.label, shown),
            NONE if trial.trial is None else trial.trial,
            settings(trial.settings) or NONE,
            "diverged" if trial.validation is None else number(trial.validation, 4),
            "chosen" if trial.chosen else "",
        ]
        for trial in trials
    ]
    marked = [i for i, trial in enumerate(trials) if trial.chosen]
    head = ["", "trial", "settings", "validation loss", ""]
    return table(head, cells, text=(0, 2, 4), marked=marked)


def fisher_table(errors: Sequence[LayerError], shown: Mapping[str, Look]) -> Markup:
    """Tabulate the median error over steps: one row per contestant, one column per layer."""
    names = layers(errors)
    known = {(error.contestant, error.layer): error.median for error in errors}
    labels = {error.contestant: error.label for error in errors}
    cells = [
        [_name(key, text, shown), *(number(known.get((key, layer))) for layer in names)]
        for key, text in labels.items()
    ]
    head = ["", *(f"layer {layer}" for layer in names)]
    return table(head, cells)


def reported_table(reported: Mapping[str, Mapping[str, float]], rows: Sequence[Row]) -> Markup:
    """Tabulate the papers' figures beside our final training losses, in separate columns."""
    columns = list(dict.fromkeys(column for line in reported.values() for column in line))
    measured = list(dict.fromkeys((row.problem, row.phase) for row in rows if row.phase in FULL))
    cells = []
    for name, figures in reported.items():
        own = {
            (row.problem, row.phase): spread(row.train)
            for row in rows
            if name.casefold() in (row.contestant.casefold(), row.label.casefold())
        }
        line = [name, *(_as_given(figures.get(column)) for column in columns)]
        cells.append([*line, *(own.get(race, NONE) for race in measured)])
    head = ["", *columns, *(f"{problem}, {phase}" for problem, phase in measured)]
    groups = [("", 1), ("reported", len(columns))]
    groups += [("measured here: training loss", len(measured))] if measured else []
    return table(head, cells, groups=[group for group in groups if group[1]])


def spread(values: Spread | None) -> str:
    """Format a median, with the range if there is one."""
    if values is None:
        return NONE
    median, low, high = (number(value, 4) for value in values)
    if values.low == values.high:
        return median
    return Markup("{} <span class=range>({} .. {})</span>").format(median, low, high)


def settings(values: Mapping[str, Any]) -> str:
    """Format settings on one line."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def _name(contestant: str, label: str, shown: Mapping[str, Look]) -> Markup:
    look = shown[contestant]
    line = f"border-top: 3px {'dashed' if look.dashes else 'solid'} {look.colour}"
    return Markup('<span class=line style="{}"></span>{}').format(line, label)


def _as_given(value: Any) -> str:
    """Format a paper's figure with its original digits."""
    plain = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.10g}" if plain else number(value)
