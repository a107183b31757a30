"""Study of accuracy against cost after equal training time, by the fast recipe.

Epochs follow from a measured speed of each model, so that every schedule reaches its end. The
report can also be of runs that ended elsewhere, such as those of ``benchmarks/runs.py``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm
import torch

from smallfry.errors import SmallfryError, Stopped, UsageError
from smallfry.io.terminal import say
from smallfry.report.page import image
from smallfry.report.run_pictures import Panel, Series, draw_panels
from smallfry.report.runs import Outcome, accuracy_cell, deviation, mean, strong, where
from smallfry.report.runs_page import Section, save_page, write_page
from smallfry.report.table import NONE, number, table
from smallfry.studies.config import ParetoConfig
from smallfry.studies.deployed import PRECISIONS, measure_deployed
from smallfry.studies.fast_recipe import fast_recipe
from smallfry.studies.folder import locked, read_measured, reporting, stoppable
from smallfry.studies.grid import claim, read_outcomes, require_possible, run_grid, run_path
from smallfry.studies.recipes import Planned
from smallfry.studies.speed import cores_of, epochs_within, measure_epoch
from smallfry.studies.study_models import StudyModel, find_study_models, label_of
from smallfry.training.checkpoint import write_file
from smallfry.training.provenance import provenance
from smallfry.training.run import RunFolder

SPEED, DEPLOYED = "speed.json", "deployed.json"
MODELS = (
    *("loopnet_70k", "loopnet_300k", "loopnet_1m", "loopnet_2m", "vitrm_thrifty", "vitrm_tiny"),
    *("cct_2_3x2", "cct_4_3x2", "resnet8_mlperf_tiny", "resnet20_he", "resnet18_cifar"),
    *("mobilenetv3_small", "simplenet_310k"),
)
RUN = re.compile(r"(?P<name>.+)-seed(?P<seed>\d+)")
ABOUT = (
    "Every model had about the same training time; a run has at least one epoch and ends with a "
    "whole one, so the minutes differ. Rates of models other than LoopNet were not tuned. Bold is "
    "a cost at which no other model is as cheap and more accurate: the Pareto front."
)
ABOUT_FINISHED = (
    "Runs that ended elsewhere, each with the time and the recipe that it had. Bold is a cost at "
    "which no other is as cheap and more accurate: the Pareto front."
)
COSTS = {
    "parameters": "parameters, millions",
    "macs": "multiply-accumulates, millions",
    "float32_ms": "latency of one image, float32, ms",
    "int8_ms": "latency of one image, int8, ms",
    "int8_bytes": "ONNX file, int8, kB",
}
SCALES = {"parameters": 1e6, "macs": 1e6, "int8_bytes": 1e3}


def run_equal_time(config: ParetoConfig, folder: Path) -> Path:
    """Measure speeds, run the missing trainings, and write the report of all that have ended.

    Returns:
        The report, an HTML page.

    Raises:
        UsageError: Settings that make no sense, contradict the runs in the folder, or name a model
            or data that is not there.
        DataError: The data can't be used.
        Stopped: A signal came; the report is of what had ended.
    """
    if config.finished is not None:
        return _report_finished(config, config.finished, folder)
    models = _registered(config)
    config = replace(config, threads=config.threads or torch.get_num_threads())
    require_possible(_planned(config, models, dict.fromkeys(models, 1)), folder)
    with locked(folder):
        claim("pareto", [], folder)
        note = f"what ended is in {folder}, the same command goes on"
        try:
            with stoppable(note):
                speeds = _speeds(config, models, folder)
        except Stopped as stop:
            raise Stopped(stop.signal_number, f"stopped; {note}") from None
        planned = plan(config, models, speeds)
        try:
            outcomes = run_grid("pareto", planned, folder)
        except Stopped:
            _report(config, read_outcomes(planned, folder), len(planned), folder, speeds, {})
            raise
        runs = {o.facts["model"]: run_path(folder, o.name) for o in reversed(outcomes) if o.summary}
        with stoppable(note):
            timed = _deployed(config, {n: runs[n] for n in models if n in runs}, folder)
        return _report(config, outcomes, len(planned), folder, speeds, timed)


def plan(
    config: ParetoConfig,
    models: Mapping[str, StudyModel],
    speeds: Mapping[str, Mapping[str, float]],
) -> list[Planned]:
    """List the runs of all models with all seeds, with as many epochs as fit."""
    assert config.minutes is not None
    assert config.threads is not None
    seconds = 60 * config.minutes * cores_of(config.device, config.threads)
    epochs = {name: epochs_within(seconds, speed) for name, speed in speeds.items()}
    return _planned(config, models, epochs)


def _planned(
    config: ParetoConfig, models: Mapping[str, StudyModel], epochs: Mapping[str, int]
) -> list[Planned]:
    return [
        Planned(
            f"{name}-s{seed}",
            {"model": name, "seed": seed},
            fast_recipe(entry, config, epochs[name], seed),
        )
        for seed in range(config.seeds)
        for name, entry in models.items()
        if name in epochs
    ]


def _registered(config: ParetoConfig) -> dict[str, StudyModel]:
    """Return the study's models, without those that are not registered.

    Raises:
        UsageError: None is left, or a name is unknown.
    """
    found = find_study_models(MODELS if config.models is None else config.models)
    missing = [name for name, entry in found.items() if not timm.is_model(entry.model)]
    for name in missing:
        say(f"{name} is left out: {found.pop(name).model} is not registered with timm here")
    if not found:
        raise UsageError(f"none of the models is registered: {', '.join(missing)}")
    return found


def _speeds(
    config: ParetoConfig, models: Mapping[str, StudyModel], folder: Path
) -> dict[str, dict[str, float]]:
    """Measure the speeds that are missing, and record each; a model that fails has none."""
    file = folder / SPEED
    asked = {
        "data": Path(config.data.name).name,
        "limit": config.data.limit,
        "threads": config.threads,
        "device": config.device,
        "precision": config.precision,
        "compile": config.compile,
    }
    known = read_measured(file)
    if known.get("asked") != asked or not isinstance(known.get("models"), dict):
        known = {"asked": asked, "models": {}}
    for place, (name, entry) in enumerate(models.items(), start=1):
        if name in known["models"]:
            continue
        say(f"measuring the speed of {name}, {place} of {len(models)}")
        recipe = fast_recipe(entry, config, 1, 0)
        try:
            speed = measure_epoch(recipe, config.speed_seconds)
        except Stopped:
            raise
        except (SmallfryError, RuntimeError, MemoryError) as error:
            say(f"{name} is left out: {error}")
            continue
        known["models"][name] = speed
        known["provenance"] = provenance(torch.device("cpu"))
        write_file(file, json.dumps(known, indent=1) + "\n")
        say(f"{name}: {number(speed['epoch_seconds'])} CPU seconds per epoch")
    return {name: known["models"][name] for name in models if name in known["models"]}


def _report_finished(config: ParetoConfig, source: Path, folder: Path) -> Path:
    """Write the report of runs that ended elsewhere.

    Raises:
        UsageError: There are none in the folder, or none of such a name.
    """
    outcomes: list[Outcome] = []
    runs: dict[str, Path] = {}
    for path in sorted(source.expanduser().glob("*-seed*")):
        match, summary = RUN.fullmatch(path.name), RunFolder(path).read_summary()
        if match is None or summary is None:
            continue
        if config.models is not None and match["name"] not in config.models:
            continue
        facts = {"model": match["name"], "seed": int(match["seed"])}
        outcomes.append(Outcome(path.name, facts, summary, RunFolder(path).read_metrics()))
        runs.setdefault(match["name"], path)
    found = {outcome.facts["model"] for outcome in outcomes}
    missing = [name for name in config.models or () if name not in found]
    if missing or not outcomes:
        wanted = f"NAME-seedN of {', '.join(missing)}" if missing else "NAME-seedN"
        raise UsageError(f"{source}: no run {wanted} with a summary.json is there")
    with locked(folder), stoppable(f"the same command goes on in {folder}"):
        claim("pareto", [], folder)
        timed = _deployed(config, runs, folder)
        return _report(config, outcomes, len(outcomes), folder, {}, timed)


def _deployed(config: ParetoConfig, runs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Measure the ONNX files of the runs, or read what was measured of the same runs."""
    file = folder / DEPLOYED
    asked = {
        "runs": {name: path.name for name, path in runs.items()},
        "rounds": config.latency_rounds,
        "threads": config.latency_threads,
    }
    summaries = {name: _digest(path) for name, path in runs.items()}
    known = read_measured(file)
    if known.get("asked") == asked and known.get("summaries", summaries) == summaries:
        return known
    models = measure_deployed(
        runs, config.data.root, config.latency_rounds, config.latency_threads, say
    )
    found = {
        **{"asked": asked, "summaries": summaries, "models": models},
        "provenance": provenance(torch.device("cpu")),
    }
    write_file(file, json.dumps(found, indent=1) + "\n")
    return found


def _digest(run: Path) -> str:
    """Return the digest of a run's summary, which no other run of its name has."""
    return sha256(RunFolder(run).summary.read_bytes()).hexdigest()


def _report(
    config: ParetoConfig,
    outcomes: list[Outcome],
    planned: int,
    folder: Path,
    speeds: Mapping[str, Any],
    timed: Mapping[str, Any],
) -> Path:
    ended = [o.summary["data"]["name"] for o in outcomes if o.summary is not None]
    data = ended[0] if ended else Path(config.data.name).name
    minutes = "finished runs" if config.minutes is None else f"{config.minutes:g} minutes"
    about = ABOUT_FINISHED if config.minutes is None else ABOUT
    with reporting(folder):
        (folder / "pictures").mkdir(exist_ok=True)
        section = _section(config, outcomes, folder, speeds, timed)
        title = f"Pareto: {data}, {minutes}"
        page, summary = write_page(title, about, [section], outcomes, planned)
        return save_page(folder, page, summary)


def _section(
    config: ParetoConfig,
    outcomes: Sequence[Outcome],
    folder: Path,
    speeds: Mapping[str, Any],
    timed: Mapping[str, Any],
) -> Section:
    """Build the table and the picture."""
    groups = {
        name: where(outcomes, model=name)
        for name in dict.fromkeys(str(o.facts["model"]) for o in outcomes)
    }
    rows = {name: _row(group, timed.get("models", {}).get(name)) for name, group in groups.items()}
    file = folder / "pictures" / "pareto.png"
    draw_panels(_panels(rows), file)
    machine = timed.get("provenance", {}).get("device", "not measured yet")
    threads = f"{config.latency_threads} thread{'s' if config.latency_threads > 1 else ''}"
    html = [
        image(file, "accuracy against cost"),
        f"Latency: ONNX Runtime, one image, {threads}, median of {config.latency_rounds}, all "
        f"models in turns, {machine}. Int8: change of the accuracy on the validation images.",
        _table(rows, groups),
    ]
    measured = [{"model": name, **row} for name, row in rows.items()]
    return Section("Accuracy against cost", html, {"models": measured, "speeds": dict(speeds)})


def _row(group: Sequence[Outcome], timed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Collect the figures of a model; None where there is none."""
    timed = timed or {}
    flips = [(o.measured("test_flips") or {}).get("accuracy") for o in group]
    row: dict[str, Any] = {
        "runs": len(group),
        "test": mean(group, lambda o: o.test),
        "deviation": deviation(group, lambda o: o.test),
        "flips": mean_of([100 * value for value in flips if value is not None]),
        "epochs": mean(group, lambda o: o.measured("epochs")),
        "minutes": mean(group, lambda o: o.minutes),
        "cpu_minutes": mean(group, _cpu_minutes),
        "parameters": mean(group, lambda o: o.measured("parameters")),
        "macs": mean(group, lambda o: o.measured("macs")),
        "int8_points": timed.get("int8_points"),
        "error": timed.get("error"),
    }
    for precision in PRECISIONS:
        one = timed.get(precision, {})
        row[f"{precision}_ms"], row[f"{precision}_bytes"] = one.get("median_ms"), one.get("bytes")
    return row


def _cpu_minutes(outcome: Outcome) -> float | None:
    seconds = outcome.measured("cpu_seconds")
    return None if seconds is None else float(seconds) / 60


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return sum(values) / len(values) if values else None


def is_on_front(name: str, cost: str, rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether no other model is better in cost or accuracy and no worse in the other."""
    own = rows[name]
    if own[cost] is None or own["test"] is None:
        return False
    for other, row in rows.items():
        if other == name or row[cost] is None or row["test"] is None:
            continue
        theirs, ours = (row[cost], -row["test"]), (own[cost], -own["test"])
        if theirs != ours and all(a <= b for a, b in zip(theirs, ours, strict=True)):
            return False
    return True


def _table(rows: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[Outcome]]) -> str:
    def shown(name: str, cost: str, text: str) -> str:
        return strong(text) if is_on_front(name, cost, rows) else text

    cells = []
    for name, row in rows.items():
        kilobytes = {p: _scaled(row[f"{p}_bytes"], 1e3) for p in PRECISIONS}
        points = row["int8_points"]
        cells.append(
            [
                label_of(name),
                accuracy_cell(groups[name]),
                NONE if row["flips"] is None else f"{row['flips']:.2f}",
                number(row["epochs"]),
                number(row["minutes"]),
                number(row["cpu_minutes"]),
                shown(name, "parameters", _count(row["parameters"])),
                shown(name, "macs", number(_scaled(row["macs"], 1e6))),
                shown(name, "float32_ms", number(row["float32_ms"])),
                shown(name, "int8_ms", number(row["int8_ms"])),
                number(kilobytes["float32"]),
                shown(name, "int8_bytes", number(kilobytes["int8"])),
                NONE if points is None else f"{points:+.2f}",
            ]
        )
    head = ["", "test %", "with flips", "epochs", "minutes", "CPU minutes", "parameters", "MMAC"]
    head += ["float32, ms", "int8, ms", "float32, kB", "int8, kB", "int8, points"]
    return table(head, cells)


def _panels(rows: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    panels = []
    for cost, label in COSTS.items():
        series = [
            Series(
                label_of(name),
                [row[cost] / SCALES.get(cost, 1.0)],
                [row["test"]],
                error=[row["deviation"]],
            )
            for name, row in rows.items()
            if row[cost] is not None and row["test"] is not None
        ]
        panels.append(Panel("", label, series, joined=False))
    return panels


def _count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value / scale
