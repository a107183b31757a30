"""Studies of training runs, each in its own folder, by the ordinary training code.

What has ended stays, what was interrupted goes on where it stopped, and a run that fails is noted
and does not stop the others.
"""

import gc
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from smallfry.errors import RunError, Stopped, TrainingError, UsageError
from smallfry.report.runs import OUT_OF_MEMORY, Outcome
from smallfry.studies.folder import STUDY, stoppable
from smallfry.studies.grid_progress import GridProgress
from smallfry.studies.recipes import Planned
from smallfry.training.checkpoint import saved_position, write_file
from smallfry.training.config import DataConfig, TrainConfig, read_config
from smallfry.training.continuation import dotted
from smallfry.training.initial_weights import unknown_model
from smallfry.training.progress import Reporter
from smallfry.training.run import FAILURE, RunFolder
from smallfry.training.train import resume, train, with_full_paths
from smallfry.training.training_data import load_training_data
from smallfry.transforms.build import is_model


def run_grid(study: str, planned: Sequence[Planned], folder: Path) -> list[Outcome]:
    """Run everything that has not ended, and return all outcomes.

    Args:
        study: Its name.
        planned: All its runs.
        folder: The study's, locked by the caller.

    Raises:
        UsageError: The folder holds another study, or runs with other settings.
        Stopped: A signal came; the interrupted run is saved.
    """
    claim(study, planned, folder)
    ended = {p.name: o for p in planned if (o := read_outcome(p, folder)) is not None}
    note = f"what ended is in {folder}, the same command goes on"
    threads = torch.get_num_threads()
    done = {p.name: _epochs_done(p, folder) for p in planned if p.name not in ended}
    with GridProgress(planned, ended, done) as progress, stoppable(note):
        for plan in planned:
            if plan.name in ended:
                continue
            torch.set_num_threads(threads)  # a small model's run leaves one
            try:
                _run(plan, folder, progress.begin(plan))
            except Stopped as stop:
                raise Stopped(stop.signal_number, f"stopped; {note}") from None
            outcome = read_outcome(plan, folder)
            assert outcome is not None
            ended[plan.name] = outcome
            progress.end(outcome)
    torch.set_num_threads(threads)
    return [ended[plan.name] for plan in planned]


def require_possible(planned: Iterable[Planned], folder: Path) -> None:
    """Require the models and the data of all runs that have not ended, before the first begins.

    Args:
        planned: All runs of a study.
        folder: The study's.

    Raises:
        UsageError: An unknown model or data set.
        DataError: Data that can't be used.
    """
    seen: list[DataConfig] = []
    for config in (p.config for p in planned if read_outcome(p, folder) is None):
        if not is_model(config.model.name):
            raise unknown_model(config.model.name)
        if config.data not in seen:
            seen.append(config.data)
            load_training_data(with_full_paths(config))


def _epochs_done(plan: Planned, folder: Path) -> float:
    """Count a run's saved epochs; 0 if unreadable, which resuming reports."""
    try:
        position = saved_position(RunFolder(run_path(folder, plan.name)).last)
    except RunError:
        return 0.0
    return float(position["epoch"]) if position else 0.0


def read_outcomes(planned: Sequence[Planned], folder: Path) -> list[Outcome]:
    """Read the outcomes of all ended runs."""
    return [o for plan in planned if (o := read_outcome(plan, folder)) is not None]


def read_outcome(plan: Planned, folder: Path) -> Outcome | None:
    """Read the outcome of a run; None if it has not ended."""
    run = RunFolder(run_path(folder, plan.name))
    summary = run.read_summary()
    if summary is not None:
        return Outcome(plan.name, plan.facts, summary, run.read_metrics())
    try:
        failure = json.loads((run.path / FAILURE).read_text())["failure"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{run.path / FAILURE}: damaged ({error!r}); delete it, then the run is made again"
        ) from error
    return Outcome(plan.name, plan.facts, None, run.read_metrics(), failure)


def run_path(folder: Path, name: str) -> Path:
    """Return the folder of a run."""
    return folder / "runs" / name


def _run(plan: Planned, folder: Path, reporter: Reporter) -> None:
    """Start or resume one run, and record its failure."""
    path = run_path(folder, plan.name)
    failure = None
    try:
        if RunFolder(path).config.exists():
            _follow_data(RunFolder(path), plan.config.data.root)
            resume(path, reporter)
        else:
            train(replace(plan.config, run=path), reporter)
    except torch.AcceleratorError:  # the device is lost to this process
        raise
    except (TrainingError, UsageError, MemoryError, RuntimeError) as error:
        failure = _in_words(error)
    if failure is not None:
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / FAILURE, json.dumps({"failure": failure}, indent=2) + "\n")
    _clean_up()  # here, as an exception keeps tensors alive


def _follow_data(run: RunFolder, root: Path | None) -> None:
    """Update the data path of an interrupted run; its content is verified later."""
    told = read_config(run.config)
    if root is not None and root.expanduser().resolve() != told.data.root:
        moved = replace(told, data=replace(told.data, root=root.expanduser().resolve()))
        write_file(run.config, yaml.safe_dump(moved.to_dict(), sort_keys=False))


def _clean_up() -> None:
    """Reset memory and compiler for the next run."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _in_words(error: Exception) -> str:
    message = str(error).strip().splitlines()
    first = message[0] if message else type(error).__name__
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    memory = memory or "can't allocate memory" in first or "not enough memory" in first
    return f"{OUT_OF_MEMORY}: {first}" if memory else first


def claim(study: str, planned: Sequence[Planned], folder: Path) -> None:
    """Record the settings of the study's runs, and refuse to mix them with others."""
    file = folder / STUDY
    known: dict[str, Any] = {"study": study, "runs": {}}
    if file.exists():
        try:
            known = json.loads(file.read_text())
            _ = known["study"], {name: {**told} for name, told in known["runs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{file}: not a study file ({error!r}); use another --folder"
            ) from None
    if known["study"] != study:
        raise UsageError(f"{folder} holds the study {known['study']}; use another --folder")
    default = _told(TrainConfig())  # of settings that a study of an earlier version did not have
    for plan in planned:
        told = _told(plan.config)
        before = known["runs"].setdefault(plan.name, told)
        for key in sorted({*before, *told}, key=lambda key: ("." in key, key)):
            was = before.get(key, default.get(key))
            if was != told.get(key):
                raise UsageError(
                    f"the runs in {folder} have {key} {was}, not "
                    f"{told.get(key)}: use the same settings, or another --folder"
                )
    write_file(file, json.dumps(known, indent=1) + "\n")


def _told(config: TrainConfig) -> dict[str, Any]:
    """Flatten a run's settings to dotted names, without the paths of data and folder."""
    told = dotted(config.to_dict())
    for place in ("run", "progress", "data.root"):
        told.pop(place, None)
    return told
