"""Statistics of an optimizer race, as pure functions of its records.

A record is one run of one contestant on one problem; its ``phase`` is its purpose. Seeds are
joined by their median, in which a run that diverged counts as infinite: a contestant of whose
runs at least half diverged has no figure.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from statistics import median
from typing import Any, NamedTuple

from smallfry.io.natural import natural
from smallfry.report.race_curves import (
    Loss,
    Run,
    at_seconds,
    curve,
    last_second,
    run_of,
    time_to_reach,
)

Record = Mapping[str, Any]

FULL = ("tuned", "defaults")  # the phases that are run for the whole budget
MAX_DIGITS = 6


class Spread(NamedTuple):
    """Summary of a figure over seeds; infinite where a run diverged."""

    median: float
    low: float
    high: float


class Row(NamedTuple):
    """Results of one contestant in one phase of one problem."""

    problem: str
    phase: str
    contestant: str
    label: str
    family: str
    settings: tuple[Mapping[str, Any], ...]  # more than one if seeds ran with different ones
    end: float  # seconds of the clock at which the losses are compared
    start: float | None  # training loss before the first step
    train: Spread | None  # None: no run has a point
    validation: Spread | None
    steps: float | None
    plain_ms: float | None
    refresh_ms: float | None
    mean_ms: float | None
    mean_over_adamw: float | None
    state_over_weights: float | None
    diverged: int
    seeds: int


class Reach(NamedTuple):
    """Time of one contestant to each target; None where too few seeds reached it."""

    contestant: str
    label: str
    seconds: tuple[float | None, ...]  # per target
    over_adamw: tuple[float | None, ...]
    over_kfac: tuple[float | None, ...]


class Trial(NamedTuple):
    """Result of one tuning setting of a contestant."""

    contestant: str
    label: str
    trial: int | None
    settings: Mapping[str, Any]
    validation: float | None  # at the end of the run; None: diverged
    chosen: bool  # the full runs have these settings; without such runs, the lowest so far


class LayerError(NamedTuple):
    """Error of a contestant's Fisher matrix of one layer along the trajectory."""

    contestant: str
    label: str
    layer: str
    steps: tuple[float, ...]
    errors: tuple[float, ...]  # relative, in the Frobenius norm; the median over seeds
    median: float  # over steps


def summarize(records: Sequence[Record]) -> list[Row]:
    """Summarise all problems and full phases; within a phase by ascending training loss."""
    rows = []
    for problem in problems(records):
        for phase in FULL:
            race = select(records, problem, phase)
            end = common_end([run_of(record["measured"]) for record in race])
            found = [_row(group, end) for group in by_contestant(race).values()]
            adamw = next((row.mean_ms for row in found if row.contestant == "adamw"), None)
            found = [row._replace(mean_over_adamw=_ratio(row.mean_ms, adamw)) for row in found]
            rows += sorted(found, key=_final)
    return rows


def choose_targets(rows: Sequence[Row]) -> list[float]:
    """Choose up to three training losses as targets for one race, the easiest first.

    They are the final losses that three quarters, half and a quarter of the contestants reached,
    rounded up to two digits, or to as many more as it takes to distinguish the three; those not
    below where every contestant starts are left out.
    """
    finals = sorted(row.train.median for row in rows if row.train)
    finals = [loss for loss in finals if 0 < loss < math.inf]
    if not finals:
        return []
    start = min((row.start for row in rows if row.start is not None), default=math.inf)
    anchors = [finals[math.ceil(len(finals) * share) - 1] for share in (0.75, 0.5, 0.25)]
    for digits in range(2, MAX_DIGITS + 1):
        targets = [_round_up(loss, digits) for loss in anchors]
        if len(set(targets)) == len(set(anchors)) and (targets[0] < start or anchors[0] >= start):
            break
    return sorted({target for target in targets if target < start}, reverse=True)


def times(records: Sequence[Record], rows: Sequence[Row]) -> list[Reach]:
    """Measure the time of each contestant to each target, in the order of the rows.

    Args:
        records: Records of one problem and one full phase.
        rows: Rows of the same race.
    """
    targets = choose_targets(rows)
    groups = by_contestant(records)
    end = rows[0].end if rows else 0.0

    def seconds_of(contestant: str) -> list[float | None]:
        runs = [run_of(record["measured"]) for record in groups.get(contestant, [])]
        return [_median([_within(run, t, end) for run in runs]) for t in targets]

    adamw, kfac = seconds_of("adamw"), seconds_of("kfac")
    found = []
    for row in rows:
        own = seconds_of(row.contestant)
        over = [tuple(map(_ratio, own, other)) for other in (adamw, kfac)]
        found.append(Reach(row.contestant, row.label, tuple(own), *over))
    return found


def tuning(records: Sequence[Record], problem: str) -> list[Trial]:
    """List the trials of a problem: contestants by their best trial, best first."""
    full = by_contestant(select(records, problem, "tuned"))
    groups = []
    for contestant, group in by_contestant(select(records, problem, "tuning")).items():
        found = [_trial(record) for record in group]
        found.sort(key=lambda t: math.inf if t.validation is None else t.validation)
        wanted = [_key(record.get("settings")) for record in full.get(contestant, [])]
        if not wanted and found[0].validation is not None:
            wanted = [_key(found[0].settings)]
        groups.append([t._replace(chosen=_key(t.settings) in wanted) for t in found])
    groups.sort(key=lambda g: math.inf if g[0].validation is None else g[0].validation)
    return [trial for group in groups for trial in group]


def fisher(records: Sequence[Record], problem: str) -> list[LayerError]:
    """List the errors of the Fisher matrices of a problem, by contestant, then by layer."""
    found = []
    for contestant, group in by_contestant(select(records, problem, "fisher")).items():
        errors: dict[str, dict[float, list[float]]] = {}
        for record in group:
            for point in record["measured"].get("points") or []:
                for layer, error in (point.get("layers") or {}).items():
                    if error is not None and math.isfinite(error):
                        of_layer = errors.setdefault(str(layer), {})
                        of_layer.setdefault(point["step"], []).append(error)
        for layer in sorted(errors, key=natural):
            steps = sorted(errors[layer])
            values = [median(errors[layer][step]) for step in steps]
            line = (layer, tuple(steps), tuple(values), median(values))
            found.append(LayerError(contestant, label(group[-1]), *line))
    return found


def layers(errors: Iterable[LayerError]) -> list[str]:
    """List the layers with known errors, in order."""
    return sorted({error.layer for error in errors}, key=natural)


def problems(records: Iterable[Record]) -> list[str]:
    """List the problems in the records, in order of first appearance."""
    return list(dict.fromkeys(str(record["problem"]) for record in records))


def select(records: Iterable[Record], problem: str, phase: str) -> list[Record]:
    """Select the records of a race; of a repeated run, the last."""
    kept: dict[str, Record] = {}
    for record in records:
        if str(record["problem"]) == problem and record["phase"] == phase:
            run = [record["contestant"], record.get("seed")]
            run += [record.get("trial"), record.get("settings")] if phase == "tuning" else []
            kept[_key(run)] = record
    return list(kept.values())


def by_contestant(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records by contestant, in order of first appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record["contestant"]), []).append(record)
    return groups


def common_end(runs: Sequence[Run]) -> float:
    """Return the last second reached by all runs, without those that diverged or ended early."""
    ends = [last_second(run) for run in runs if not run.diverged]
    ends = ends or [last_second(run) for run in runs]
    return min((end for end in ends if end >= max(ends) / 2), default=0.0)


def label(record: Record) -> str:
    """Return a contestant's display name."""
    return str(record.get("label") or record["contestant"])


def _row(group: Sequence[Record], end: float) -> Row:
    last = group[-1]
    runs = [run_of(record["measured"]) for record in group]
    starts = [loss[0] for run in runs if len(loss := curve(run.points, "step", "train").loss)]

    def cost(name: str) -> float | None:
        values = [record["measured"].get(name) for record in group]
        values = [value for value in values if value is not None and math.isfinite(value)]
        return float(median(values)) if values else None

    return Row(
        problem=str(last["problem"]),
        phase=last["phase"],
        contestant=str(last["contestant"]),
        label=label(last),
        family=str(last.get("family")),
        settings=tuple({_key(s): s for r in group if (s := r.get("settings") or {})}.values()),
        end=end,
        start=float(median(starts)) if starts else None,
        train=_spread(runs, end, "train"),
        validation=_spread(runs, end, "validation"),
        steps=cost("steps"),
        plain_ms=cost("plain_ms"),
        refresh_ms=cost("refresh_ms"),
        mean_ms=cost("mean_ms"),
        mean_over_adamw=None,
        state_over_weights=cost("state_over_weights"),
        diverged=sum(run.diverged for run in runs),
        seeds=len(runs),
    )


def _spread(runs: Sequence[Run], end: float, loss: Loss) -> Spread | None:
    values = []
    for run in runs:
        value = None if run.diverged else at_seconds(run.points, end, loss)
        values.append(math.inf if value is None else value)
    return Spread(float(median(values)), min(values), max(values)) if values else None


def _final(row: Row) -> tuple[float, str]:
    return (row.train.median if row.train else math.inf, row.contestant)


def _within(run: Run, target: float, end: float) -> float | None:
    seconds = time_to_reach(run.points, target)
    return seconds if seconds is not None and seconds <= end else None


def _median(values: Sequence[float | None]) -> float | None:
    found = median([math.inf if value is None else value for value in values] or [math.inf])
    return found if math.isfinite(found) else None


def _ratio(own: float | None, other: float | None) -> float | None:
    return own / other if own is not None and other else None


def _round_up(value: float, digits: int) -> float:
    exact = Decimal(repr(value))
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), ROUND_CEILING))


def _trial(record: Record) -> Trial:
    run = run_of(record["measured"])
    losses = curve(run.points, "seconds", "validation").loss
    return Trial(
        contestant=str(record["contestant"]),
        label=label(record),
        trial=record.get("trial"),
        settings=record.get("settings") or {},
        validation=None if run.diverged or not len(losses) else float(losses[-1]),
        chosen=False,
    )


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
