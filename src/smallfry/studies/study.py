"""Training studies by name: their runs and their reports."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smallfry.errors import Stopped, UsageError, first_line
from smallfry.report.runs import Outcome
from smallfry.report.runs_page import Section, save_page, write_page
from smallfry.studies import batch_size, optimizer, pareto, recursion
from smallfry.studies.config import ParetoConfig, RunsConfig
from smallfry.studies.equal_time import run_equal_time
from smallfry.studies.folder import locked, reporting
from smallfry.studies.grid import read_outcomes, require_possible, run_grid
from smallfry.studies.recipes import Planned


class Study(NamedTuple):
    """Study of training runs."""

    title: str
    about: str
    plan: Callable[[Any], list[Planned]]
    sections: Callable[[Any, list[Outcome], Path], list[Section]]


STUDIES = {
    name: Study(module.TITLE, module.ABOUT, module.plan, module.sections)
    for name, module in {
        "batch-size": batch_size,
        "recursion": recursion,
        "optimizer": optimizer,
        "pareto": pareto,
    }.items()
}


def run_study(name: str, config: RunsConfig, folder: Path) -> Path:
    """Run the missing trainings, and write the report of all finished ones.

    Args:
        name: A key of ``STUDIES``.
        config: That study's configuration.
        folder: Folder of runs and report.

    Returns:
        The report, an HTML page.

    Raises:
        UsageError: The configuration makes no sense, contradicts the runs in the folder, or names
            a model or data that is not there.
        DataError: The data can't be used.
        Stopped: A signal came; the report is of what had ended.
    """
    study = STUDIES[name]
    _check(config)
    config = _each_once(config)
    if isinstance(config, ParetoConfig) and (config.minutes or config.finished) is not None:
        return run_equal_time(config, folder)
    planned = list({plan.name: plan for plan in study.plan(config)}.values())
    require_possible(planned, folder)
    with locked(folder):
        try:
            outcomes = run_grid(name, planned, folder)
        except Stopped:
            _report(study, config, read_outcomes(planned, folder), len(planned), folder)
            raise
        return _report(study, config, outcomes, len(planned), folder)


def _report(
    study: Study, config: RunsConfig, outcomes: list[Outcome], planned: int, folder: Path
) -> Path:
    with reporting(folder):
        (folder / "pictures").mkdir(exist_ok=True)
        sections = study.sections(config, outcomes, folder)
        title = f"{study.title}: {Path(config.data.name).name}"
        page, summary = write_page(title, study.about, sections, outcomes, planned)
        return save_page(folder, page, summary)


def _each_once(config: RunsConfig) -> RunsConfig:
    """Remove duplicates from the models, sizes and other lists of a configuration."""
    given: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)}
    for name, value in given.items():
        if isinstance(value, tuple):
            given[name] = tuple(dict.fromkeys(value))
    return replace(config, **given)


def _check(config: RunsConfig) -> None:
    counts = ("epochs", "seeds", "batch_size", "latency_rounds", "latency_threads", "threads")
    for name in counts:
        given = getattr(config, name, None)
        if given is not None and given < 1:
            raise UsageError(f"{name} must be at least 1, got {given}")
    for name in ("minutes", "speed_seconds"):
        given = getattr(config, name, None)
        if given is not None and not 0 < given < math.inf:
            raise UsageError(f"{name} must be more than 0 and finite, got {given}")
    if isinstance(config, ParetoConfig) and None not in (config.minutes, config.finished):
        raise UsageError("minutes are for training, and finished runs are not trained: give one")
    lists = ("batch_sizes", "latent_steps", "supervision_steps", "recursion_steps", "lr_factors")
    for name in lists:
        values = getattr(config, name, (1,))
        if not values or not all(0 < value < math.inf for value in values):  # nor NaN
            raise UsageError(f"{name}: give at least one, all above 0 and finite")
    if config.device != "auto":
        try:
            torch.empty(1, device=config.device)
        except (RuntimeError, AssertionError) as error:
            message = f"device {config.device} can't be used here: {first_line(error)}"
            raise UsageError(message) from None
