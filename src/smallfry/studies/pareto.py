"""Study of accuracy against parameters, MACs and latency."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from smallfry.report.page import image
from smallfry.report.run_pictures import Panel, Series, draw_panels
from smallfry.report.runs import Outcome, accuracy_cell, deviation, mean, where
from smallfry.report.runs_page import Section
from smallfry.report.table import NONE, number, table
from smallfry.studies import reported_vision as reported
from smallfry.studies.config import ParetoConfig
from smallfry.studies.folder import read_measured
from smallfry.studies.grid import run_path
from smallfry.studies.latency import choose_device, measure_latency
from smallfry.studies.recipes import Planned, recipe
from smallfry.studies.study_models import find_study_models, label_of
from smallfry.training.checkpoint import write_file
from smallfry.training.provenance import provenance
from smallfry.training.run import load_run

TITLE = "Pareto"
ABOUT = (
    "Few parameters can mean much arithmetic, and equal arithmetic can take unequal time: each "
    "model is drawn against all three. Reported figures, hollow, are of the data set and protocol "
    "that they name, and are drawn against the papers' own parameter counts."
)
MODELS = (
    *("vitrm_small", "vitrm_thrifty", "vit_small", "vit_base", "resnet18", "resnet34", "resnet50"),
    *("resnet18_cifar", "cct_6_3x1", "cct_7_3x1"),
)
Latency = Mapping[str, Mapping[str, float]]


def plan(config: ParetoConfig) -> list[Planned]:
    """List the runs of all models with all seeds."""
    return [
        Planned(
            f"{name}-s{seed}",
            {"model": name, "seed": seed},
            recipe(entry, config, config.batch_size, seed),
        )
        for seed in range(config.seeds)
        for name, entry in find_study_models(_names(config)).items()
    ]


def _names(config: ParetoConfig) -> tuple[str, ...]:
    return MODELS if config.models is None else config.models


def sections(config: ParetoConfig, outcomes: list[Outcome], folder: Path) -> list[Section]:
    """Build the table of costs, the reported figures, and the plot."""
    groups = {name: where(outcomes, model=name) for name in dict.fromkeys(_names(config))}
    complete = len(outcomes) == len(plan(config))
    timed = _latency(config, groups, folder) if complete else {}
    latency: Latency = timed.get("models", {})
    data = reported.shown_for(config.data.name)
    file = folder / "pictures" / "pareto.png"
    draw_panels(_panels(config, groups, latency, data), file)
    where_timed = timed.get("where", "not measured yet")
    html = [
        image(file, "accuracy against cost"),
        f"Latency: one image, float32, median of {config.latency_rounds} (and the middle half), "
        f"{where_timed}, all models in turns.",
        _measured_table(config, groups, latency, data),
        Markup("<h3>Reported rivals</h3>"),
        _rivals(data),
    ]
    measured = [
        {
            "model": name,
            "parameters": mean(group, lambda o: o.measured("parameters")),
            "macs": mean(group, lambda o: o.measured("macs")),
            "latency": latency.get(name),
            "test_percent": mean(group, lambda o: o.test),
            "deviation": deviation(group, lambda o: o.test),
            "runs": len(group),
        }
        for name, group in groups.items()
    ]
    figures = {
        "data": data,
        "source": reported.SOURCE,
        "percent_at_batch_128": {n: v[128] for n, v in reported.ACCURACY[data].items()},
        "millions_of_parameters": reported.MILLIONS[data],
        "rivals": [rival._asdict() for rival in reported.RIVALS[data]],
    }
    told = {"models": measured, "latency": {k: v for k, v in timed.items() if k != "models"}}
    return [Section("Accuracy against cost", html, told, figures)]


def _latency(
    config: ParetoConfig, groups: Mapping[str, list[Outcome]], folder: Path
) -> dict[str, Any]:
    """Measure latencies of the trained models, cached in ``latency.json``."""
    runs = {
        name: next((o.name for o in group if o.summary is not None), None)
        for name, group in groups.items()
    }
    ready = {name: run for name, run in runs.items() if run is not None}
    file = folder / "latency.json"
    known = read_measured(file)
    asked = (config.latency_rounds, config.latency_threads, {*ready})
    models = known.get("models")
    if isinstance(models, dict) and (known.get("rounds"), known.get("threads"), {*models}) == asked:
        return known
    device = choose_device(config.device)
    trained = {name: load_run(run_path(folder, run)) for name, run in ready.items()}
    models = measure_latency(trained, device, config.latency_rounds, config.latency_threads)
    origin = provenance(device)
    threads = f"{config.latency_threads} thread{'s' if config.latency_threads > 1 else ''}"
    on = str(origin["device"]).partition(",")[0]
    found = {
        "models": models,
        "rounds": config.latency_rounds,
        "threads": config.latency_threads,
        "where": f"on {on}, {threads}",
        "provenance": origin,
    }
    write_file(file, json.dumps(found, indent=1) + "\n")
    return found


def _measured_table(
    config: ParetoConfig, groups: Mapping[str, list[Outcome]], latency: Latency, data: str
) -> str:
    accuracy, millions = reported.ACCURACY[data], reported.MILLIONS[data]
    rows = []
    for name in dict.fromkeys([*groups, *accuracy]):
        group, timed = groups.get(name, []), latency.get(name)
        parameters = mean(group, lambda o: o.measured("parameters"))
        macs = mean(group, lambda o: o.measured("macs"))
        rows.append(
            [
                label_of(name),
                f"{millions[name]:g} M" if name in millions else NONE,
                _given(accuracy[name][128]) if name in accuracy else NONE,
                NONE if parameters is None else f"{parameters:,.0f}",
                NONE if macs is None else number(macs / 1e6),
                NONE if timed is None else _milliseconds(timed),
                accuracy_cell(group),
            ]
        )
    head = ["", "parameters", "test %", "parameters", "MMAC", "latency, ms", "test %"]
    theirs = f"reported, {reported.DATA[data]}, batch 128: {reported.SOURCE}"
    spans = [("", 1), (theirs, 2), (f"measured here, {Path(config.data.name).name}", 4)]
    return table(head, rows, groups=spans)


def _rivals(data: str) -> str:
    rows = [
        [r.label, r.epochs or NONE, f"{r.millions:g} M", f"{r.accuracy:.2f}", r.source]
        for r in _of(data)
    ]
    head = ["", "epochs", "parameters", f"test %, {reported.DATA[data]}", "source"]
    return table(head, rows, text=(0, 4))


def _rival_label(rivals: Sequence[reported.Rival]) -> str:
    epochs = ", ".join(str(rival.epochs) for rival in rivals if rival.epochs)
    return rivals[0].label + (f" ({epochs} epochs)" if epochs else "")


def _of(data: str) -> tuple[reported.Rival, ...]:
    return reported.RIVALS[data]


def _panels(
    config: ParetoConfig, groups: Mapping[str, list[Outcome]], latency: Latency, data: str
) -> list[Panel]:
    """Plot the panels; reported points share that of parameters on the same data set."""
    points: dict[str, list[Series]] = {"parameters": [], "macs": [], "latency": []}
    for name, group in groups.items():
        test = mean(group, lambda o: o.test)
        if test is None:
            continue
        macs = mean(group, lambda o: o.measured("macs"))
        timed = latency.get(name)
        costs = {
            "parameters": (mean(group, lambda o: o.measured("parameters")) or 0) / 1e6,
            "macs": None if macs is None else macs / 1e6,
            "latency": None if timed is None else timed["median_ms"],
        }
        error = [deviation(group, lambda o: o.test)]
        for kind, value in costs.items():
            if value is not None:
                points[kind].append(Series(label_of(name), [value], [test], error=error))
    theirs = [
        Series(label_of(name), [reported.MILLIONS[data][name]], [figures[128]], reported=True)
        for name, figures in reported.ACCURACY[data].items()
        if figures[128] is not None
    ]
    for name in dict.fromkeys(rival.label for rival in _of(data)):
        same = [rival for rival in _of(data) if rival.label == name]
        x, y = [rival.millions for rival in same], [rival.accuracy for rival in same]
        theirs.append(Series(_rival_label(same), x, y, reported=True))
    together = config.data.name == data
    ours = f"measured here, {Path(config.data.name).name}"
    first = f"measured and reported, {reported.DATA[data]}" if together else ours
    millions = "parameters, millions"
    panels = [] if together else [Panel(f"reported, {reported.DATA[data]}", millions, theirs)]
    panels += [
        Panel(first, millions, points["parameters"] + (theirs if together else [])),
        Panel(ours, "multiply-accumulates, millions", points["macs"]),
        Panel(ours, "latency of one image, ms", points["latency"]),
    ]
    return [panel._replace(joined=False) for panel in panels]


def _given(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:g}"


def _milliseconds(timed: Mapping[str, float]) -> str:
    low, high = number(timed["low_ms"]), number(timed["high_ms"])
    return f"{number(timed['median_ms'])} ({low} .. {high})"
