"""Study of accuracy at growing batch sizes with a fixed learning rate."""

from pathlib import Path
from typing import Any

from smallfry.report.page import image
from smallfry.report.run_pictures import Panel, Series, draw_panels
from smallfry.report.runs import Outcome, accuracy_cell, best_of, deviation, mean, strong, where
from smallfry.report.runs_page import Section
from smallfry.report.table import NONE, table
from smallfry.studies import reported_vision as reported
from smallfry.studies.config import BatchSizeConfig
from smallfry.studies.recipes import Planned, recipe
from smallfry.studies.study_models import find_study_models, label_of

TITLE = "Batch size"
ABOUT = (
    "Every model is trained with every batch size, for the same epochs and with the same peak "
    "learning rate, so a large batch also means few steps. Cells are test accuracy in percent; "
    "bold is the batch size that the selecting split likes best for that model. Sizes above the "
    "number of training images are left out."
)


def plan(config: BatchSizeConfig) -> list[Planned]:
    """List the runs of all models with all batch sizes and seeds."""
    return [
        Planned(
            f"{name}-b{size}-s{seed}",
            {"model": name, "batch_size": size, "seed": seed},
            recipe(entry, config, size, seed),
        )
        for seed in range(config.seeds)
        for name, entry in find_study_models(config.models).items()
        for size in config.batch_sizes
    ]


def sections(config: BatchSizeConfig, outcomes: list[Outcome], folder: Path) -> list[Section]:
    """Build the table of models by batch sizes, and its plot."""
    data = reported.shown_for(config.data.name)
    theirs = reported.ACCURACY[data]
    groups = {
        (name, size): [o for o in where(outcomes, model=name, batch_size=size) if _is_real(o, size)]
        for name in config.models
        for size in config.batch_sizes
    }
    file = folder / "pictures" / "batch_size.png"
    draw_panels(_panels(config, groups, data), file, same_y=config.data.name == data)
    rows = [
        [label_of(name), *_reported(name, theirs), *_measured(name, config, groups)]
        for name in dict.fromkeys([*config.models, *theirs])
    ]
    ours = Path(config.data.name).name
    head = ["", *map(str, reported.SIZES), *map(str, config.batch_sizes)]
    spans = [
        ("", 1),
        (f"reported, {reported.DATA[data]}: {reported.SOURCE}", len(reported.SIZES)),
        (f"measured here, {ours}, by batch size", len(config.batch_sizes)),
    ]
    measured = [
        {
            "model": name,
            "batch_size": size,
            "test_percent": mean(group, _test),
            "deviation": deviation(group, _test),
            "runs": len(group),
        }
        for (name, size), group in groups.items()
    ]
    return [
        Section(
            "Accuracy by batch size",
            [image(file, "accuracy by batch size"), table(head, rows, groups=spans)],
            measured,
            {"source": reported.SOURCE, "data": data, "percent": theirs},
        )
    ]


def _panels(
    config: BatchSizeConfig, groups: dict[tuple[str, int], list[Outcome]], data: str
) -> list[Panel]:
    sizes = config.batch_sizes
    ours = []
    for name in config.models:
        found = {s: m for s in sizes if (m := mean(groups[name, s], _test)) is not None}
        error = [deviation(groups[name, size], _test) for size in found]
        ours.append(Series(label_of(name), list(found), list(found.values()), error=error))
    theirs = []
    for name, figures in reported.ACCURACY[data].items():
        known = {size: value for size, value in figures.items() if value is not None}
        theirs.append(Series(label_of(name), list(known), list(known.values()), reported=True))
    return [
        Panel(f"reported, {reported.DATA[data]}", "batch size", theirs, ticks=reported.SIZES),
        Panel(f"measured here, {Path(config.data.name).name}", "batch size", ours, ticks=sizes),
    ]


def _reported(name: str, theirs: Any) -> list[str]:
    figures = theirs.get(name)
    if figures is None:
        return [NONE] * len(reported.SIZES)
    return ["out of memory" if v is None else f"{v:g}" for v in figures.values()]


def _measured(
    name: str, config: BatchSizeConfig, groups: dict[tuple[str, int], list[Outcome]]
) -> list[str]:
    own = {size: groups.get((name, size), []) for size in config.batch_sizes}
    best = best_of(own)
    return [
        strong(accuracy_cell(group)) if size == best else accuracy_cell(group)
        for size, group in own.items()
    ]


def _is_real(outcome: Outcome, size: int) -> bool:
    """Return whether a batch had its size; one has at most all training images."""
    return outcome.summary is None or outcome.summary["data"].get("train", size) >= size


def _test(outcome: Outcome) -> float | None:
    return outcome.test
