"""Study of optimizers on a recursive model, where one block is used many times."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from smallfry.errors import UsageError, nearest
from smallfry.io.numbers import exact
from smallfry.optim import METHODS
from smallfry.report.page import image
from smallfry.report.run_pictures import Panel, Series, draw_panels
from smallfry.report.runs import Outcome, accuracy_cell, best_of, deviation, mean, strong, where
from smallfry.report.runs_page import Section
from smallfry.report.table import NONE, number, table
from smallfry.studies import reported_vision as reported
from smallfry.studies.config import OptimizersConfig
from smallfry.studies.recipes import Planned, recipe
from smallfry.studies.study_models import find_vitrm
from smallfry.training.config import OptimizerConfig
from smallfry.training.optimization import peak_learning_rate

TITLE = "Optimizers on a recursive model"
ABOUT = (
    "One ViTRM, one recipe, equal epochs; only the optimizer differs. Each is tried with the same "
    "multiples of its usual learning rate (AdamW and Muon: the recipe's; natural gradient: 0.1, "
    "with damping 1, exact NG 10, and AdamW's rate for what it does not cover), and the multiple "
    "is chosen on the selecting split; bold is what that split likes best. Decoupled weight decay "
    "is scaled so that all decay alike per step. Damping and the like are not tuned: an optimizer "
    "that loses here may win with more."
)
LABELS = {"adamw": "AdamW", "muon": "Muon"} | {n: m.label for n, m in METHODS.items()}
DAMPING = 1.0  # see docs/natural_gradient.md, "Results"


def _names(config: OptimizersConfig) -> tuple[str, ...]:
    """List the optimizers to compare, each once."""
    return tuple(dict.fromkeys(config.optimizers or LABELS))


def plan(config: OptimizersConfig) -> list[Planned]:
    """List the runs of all optimizers with all rates and seeds."""
    entry = find_vitrm(config.vitrm)
    for name in _names(config):
        if name not in LABELS:
            raise UsageError(f"unknown optimizer '{name}'{nearest(name, LABELS)}")
    adamw = recipe(entry, config, config.batch_size).optimizer
    model = timm.create_model(entry.model, **entry.options)
    adamw = replace(adamw, lr=peak_learning_rate(adamw, model))
    found = []
    for seed in range(config.seeds):
        for name in _names(config):
            for factor in config.lr_factors:
                told = recipe(entry, config, config.batch_size, seed)
                told = replace(told, optimizer=optimizer_settings(name, factor, adamw))
                facts = {"optimizer": name, "lr_factor": factor, "seed": seed}
                found.append(Planned(f"{name}-lr{exact(factor)}-s{seed}", facts, told))
    return found


def optimizer_settings(name: str, factor: float, adamw: OptimizerConfig) -> OptimizerConfig:
    """Replace the recipe's AdamW by an optimizer, at a multiple of its usual rate.

    Args:
        name: A key of ``LABELS``.
        factor: The multiple.
        adamw: The recipe's, with its ``lr``.
    """
    usual = float(adamw.lr or 0)
    if name == "adamw":
        return replace(adamw, lr=usual * factor)
    if name == "muon":
        options: dict[str, Any] = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        return replace(adamw, name="nmuon", lr=usual * factor, betas=None, options=options)
    method = METHODS[name]
    return replace(
        adamw,
        name=name,
        lr=method.lr * factor,
        weight_decay=adamw.weight_decay * usual / method.lr,
        betas=None,
        clip=None,
        options={"damping": max(DAMPING, method.least_damping), "fallback_lr": usual * factor},
    )


def sections(config: OptimizersConfig, outcomes: list[Outcome], folder: Path) -> list[Section]:
    """Build the sections: each optimizer at its chosen rate, its curves, and all rates."""
    groups = {
        name: {f: where(outcomes, optimizer=name, lr_factor=f) for f in config.lr_factors}
        for name in _names(config)
    }
    chosen = {name: best_of(rates) for name, rates in groups.items()}
    at_best = {name: groups[name][f] for name, f in chosen.items() if f is not None}
    winner = best_of(at_best)
    file = folder / "pictures" / "optimizer.png"
    draw_panels(_panels(config, groups, at_best), file)
    adamw = mean(at_best.get("adamw", []), lambda o: o.minutes)
    rows, measured = [], []
    theirs = reported.ACCURACY[reported.shown_for(config.data.name)]["vitrm_small"]
    for name, rates in groups.items():
        group = at_best.get(name, [])
        every = [o for of_rate in rates.values() for o in of_rate]
        cell = accuracy_cell(group or every)
        minutes, selected = mean(group, lambda o: o.minutes), mean(group, lambda o: o.selected)
        ratio = minutes / adamw if minutes is not None and adamw else None
        rows.append(
            [
                LABELS[name],
                theirs[128] if name == "adamw" else NONE,
                NONE if chosen[name] is None else f"{chosen[name]:g} ×",
                strong(cell) if name == winner else cell,
                NONE if selected is None else f"{selected:.2f}",
                number(minutes),
                number(ratio),
            ]
        )
        measured.append(
            {
                "optimizer": name,
                "lr_factor": chosen[name],
                "test_percent": mean(group, lambda o: o.test),
                "deviation": deviation(group, lambda o: o.test),
                "selected_percent": selected,
                "minutes": minutes,
                "minutes_over_adamw": ratio,
                "runs": len(group),
            }
        )
    data = reported.DATA[reported.shown_for(config.data.name)]
    head = ["", f"{data}, batch 128", "rate", "test %", "chosen at %", "minutes", "× AdamW"]
    ours = f"measured here, {Path(config.data.name).name}"
    spans = [("", 1), ("reported", 1), (ours, 5)]
    return [
        Section(
            "At the chosen learning rate",
            [image(file, "accuracy by optimizer"), table(head, rows, groups=spans)],
            measured,
            {"source": reported.SOURCE, "data": data, "adamw_percent": theirs[128]},
        ),
        Section("All learning rates", [_rates(config, groups)], None),
    ]


def _rates(config: OptimizersConfig, groups: Mapping[str, Mapping[float, list[Outcome]]]) -> str:
    rows = []
    for name, rates in groups.items():
        best = best_of(rates)
        cells = {f: accuracy_cell(group) for f, group in rates.items()}
        rows.append([LABELS[name], *(strong(c) if f == best else c for f, c in cells.items())])
    head = ["test accuracy, %", *(f"{factor:g} ×" for factor in config.lr_factors)]
    return table(head, rows)


def _panels(
    config: OptimizersConfig,
    groups: Mapping[str, Mapping[float, list[Outcome]]],
    at_best: Mapping[str, list[Outcome]],
) -> list[Panel]:
    """Plot accuracy of the selecting split over epochs and minutes (first seed), and by rate."""
    column = f"{config.select_on}_accuracy"
    curves: dict[str, list[Series]] = {"epoch": [], "seconds": []}
    for name, group in at_best.items():
        shown = [o for o in group if o.history]
        if not shown:
            continue
        history = [row for row in shown[0].history if column in row]
        y = [100 * row[column] for row in history]
        for axis, scale in {"epoch": 1.0, "seconds": 60.0}.items():
            curves[axis].append(Series(LABELS[name], [row[axis] / scale for row in history], y))
    by_rate = []
    for name, rates in groups.items():
        known = {f: m for f, group in rates.items() if (m := mean(group, _selected)) is not None}
        by_rate.append(Series(LABELS[name], list(known), list(known.values())))
    name_of_y = f"{config.select_on} accuracy, %"
    panels = [
        Panel("at the chosen rate", "epoch", curves["epoch"], name_of_y, log=False),
        Panel("at the chosen rate", "minutes of training", curves["seconds"], name_of_y, log=False),
    ]
    if len(config.lr_factors) > 1:
        x = "multiple of the usual rate"
        panels.append(Panel("best epoch", x, by_rate, name_of_y, ticks=config.lr_factors))
    return panels


def _selected(outcome: Outcome) -> float | None:
    return outcome.selected
