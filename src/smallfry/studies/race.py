"""Optimizer races: equal tuning budgets, then full runs of equal time.

    fisher     errors of the Fisher approximations along one trajectory of AdamW's
    defaults   default settings, several seeds
    tuning     so many settings each, one seed, a shorter time; the first are the defaults
    tuned      each one's best setting by validation loss, several seeds

A trial is what can be lost: what ended is in ``trials.jsonl``, and the same command goes on.
"""

import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from smallfry.errors import SmallfryWarning, TrainingError, UsageError, first_line, nearest
from smallfry.io.signals import leave_to_parent
from smallfry.optim import METHODS
from smallfry.report.race_page import write_report
from smallfry.studies.config import RaceConfig
from smallfry.studies.contestants import CONTESTANTS, propose
from smallfry.studies.folder import locked, reporting, stoppable
from smallfry.studies.log import TrialLog
from smallfry.studies.problems import PROBLEMS, Examples, load_examples
from smallfry.studies.progress import RaceProgress
from smallfry.studies.reported import REPORTED
from smallfry.studies.trial import Job, Resources, fisher_errors, run_trial
from smallfry.training.config import MOST_WORKERS
from smallfry.training.provenance import provenance

AUTOENCODER = ("sgd", "adamw", "muon", "soap", "kfac_papers", "ekfac_kpsvd", *METHODS)
TWO_LEVEL = (
    "sgd",
    "adamw",
    "kfac",
    "two_level",
    "nicolaides",
    "krylov_nicolaides",
    "spectral",
    "residual",
    "krylov_residual",
    "tko",
)
APPROXIMATING = ("kfac", "ekfac", "ekfac_kpsvd", "kpsvd", "deflation", "lanczos", "kfac_corrected")


def run_race(study: str, config: RaceConfig, folder: Path) -> Path:
    """Run the missing parts of a race, and write the report.

    Args:
        study: "autoencoder" or "two-level", with its contestants by default.
        config: The race.
        folder: Folder of trials and report; several problems may share it.

    Returns:
        The report, an HTML page.

    Raises:
        UsageError: The configuration makes no sense, or contradicts the trials in the folder.
        Stopped: A signal came; finished trials are kept.
    """
    chosen = _check(study, config)
    resources = Resources(config.root, config.device, config.threads)
    log = TrialLog(folder)
    with locked(folder):
        records = log.read()
        _check_records(records, config, resources)
        processes = config.processes or _processes(config)
        known = _known(records)
        watching = _unwatched(config.problem, chosen, known)
        first = [
            job
            for job in _first_jobs(config, chosen)
            if (bool(watching) if job.phase == "fisher" else job.key not in known)
        ]
        if first:  # who is tuned to what is not known yet
            later = len(chosen) * config.seeds if config.tuning_trials else 0
            later -= sum(
                key[:2] == ("tuned", config.problem) and key[2] in chosen and key[3] < config.seeds
                for key in known
            )
        else:
            later = sum(job.key not in known for job in _second_jobs(config, chosen, records))
        if first or later > 0:  # fills the cache, so that the processes find decoded data
            load_examples(PROBLEMS[config.problem], config.root, torch.device("cpu"))
        expected = sum(job.seconds for job in first) + max(0, later) * config.seconds
        with (
            RaceProgress(len(first) + max(0, later), expected, processes) as progress,
            stoppable(f"finished trials are in {folder}, the same command goes on"),
        ):
            records += _run(study, first, resources, processes, log, progress, watching)
            second = [job for job in _second_jobs(config, chosen, records) if job.key not in known]
            records += _run(study, second, resources, processes, log, progress, watching)
    title = f"Race: {PROBLEMS[config.problem].title}"
    with reporting(folder):
        return write_report(records, folder, title, REPORTED.get(config.problem))


# What is to be run


def _first_jobs(config: RaceConfig, chosen: Sequence[str]) -> Iterator[Job]:
    def job(phase: Any, name: str, settings: dict[str, float], seed: int, n: int, s: float) -> Job:
        return Job(phase, config.problem, name, settings, seed, n, s)

    if config.fisher_seconds:
        settings = dict(CONTESTANTS["adamw"].defaults)
        yield job("fisher", "adamw", settings, 0, 0, config.fisher_seconds)
    for name in chosen:
        for n, settings in enumerate(propose(CONTESTANTS[name], config.tuning_trials)):
            yield job("tuning", name, settings, 0, n, config.tuning_seconds)
    for seed in range(config.seeds):
        for name in chosen:
            settings = dict(CONTESTANTS[name].defaults)
            yield job("defaults", name, settings, seed, 0, config.seconds)


def _second_jobs(
    config: RaceConfig, chosen: Sequence[str], records: Sequence[dict[str, Any]]
) -> Iterator[Job]:
    for seed in range(config.seeds):
        for name in chosen:
            best = best_trial(records, config.problem, name, config.tuning_trials)
            if best is not None:
                settings, trial = best["settings"], best["trial"]
                yield Job("tuned", config.problem, name, settings, seed, trial, config.seconds)


def best_trial(
    records: Sequence[dict[str, Any]], problem: str, contestant: str, trials: int
) -> dict[str, Any] | None:
    """Return the tuning trial with the lowest final validation loss; None if all diverged."""
    tried = [
        r
        for r in records
        if (r["phase"], r["problem"], r["contestant"]) == ("tuning", problem, contestant)
        and r["trial"] < trials
        and not r["measured"]["diverged"]
    ]
    return min(tried, key=lambda r: r["measured"]["points"][-1]["validation"], default=None)


def _known(records: Sequence[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {(r["phase"], r["problem"], r["contestant"], r["seed"], r["trial"]) for r in records}


def _unwatched(problem: str, chosen: Sequence[str], known: set[tuple[Any, ...]]) -> list[str]:
    """List the contestants whose Fisher error is not measured yet."""
    return [
        name
        for name in chosen
        if name in APPROXIMATING and ("fisher", problem, name, 0, 0) not in known
    ]


# Running


def _run(
    study: str,
    jobs: Sequence[Job],
    resources: Resources,
    processes: int,
    log: TrialLog,
    progress: RaceProgress,
    watching: Sequence[str],
) -> list[dict[str, Any]]:
    if not jobs:
        return []
    torch.set_num_threads(resources.threads)  # recorded by provenance
    origin = provenance(torch.device(resources.device))
    records: list[dict[str, Any]] = []
    for job, outcomes in _outcomes(jobs, resources, processes, watching):
        for contestant, settings, measured in outcomes:
            record: dict[str, Any] = {
                "study": study,
                "problem": job.problem,
                "phase": job.phase,
                "contestant": contestant,
                "label": CONTESTANTS[contestant].label,
                "family": CONTESTANTS[contestant].family,
                "settings": settings,
                "seed": job.seed,
                "trial": job.trial,
                "seconds": job.seconds,
                "clock": resources.clock,
                "measured": measured,
                "provenance": origin,
            }
            log.append(record)
            records.append(record)
        progress.done(job, records[-1]["measured"])
    return records


Outcome = tuple[str, dict[str, float], dict[str, Any]]


def _outcomes(
    jobs: Sequence[Job], resources: Resources, processes: int, watching: Sequence[str]
) -> Iterator[tuple[Job, list[Outcome]]]:
    """Yield trials as they end; one at a time here, several in separate processes."""
    if processes == 1:
        for job in jobs:
            yield job, _work(job, resources, watching)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (resources.threads,)) as pool:
        try:
            waiting = {pool.submit(_work, job, resources, watching): job for job in jobs}
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool:
            raise TrainingError(
                "a process of the study was killed, perhaps for lack of memory: finished trials "
                "are kept; run the same command again with fewer --processes"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _begin(threads: int) -> None:
    """Ignore terminal signals in a worker; the parent stops its children."""
    leave_to_parent(but=(signal.SIGTERM,))
    torch.set_num_threads(threads)


def _work(job: Job, resources: Resources, watching: Sequence[str]) -> list[Outcome]:
    training, held_out = _examples(job.problem, resources)
    if job.phase != "fisher":
        return [(job.contestant, job.settings, run_trial(job, resources, training, held_out))]
    found = fisher_errors(job, resources, training, watching)
    return [
        (name, dict(CONTESTANTS[name].defaults), {"points": points})
        for name, points in found.items()
    ]


@lru_cache(maxsize=1)
def _examples(problem: str, resources: Resources) -> tuple[Examples, Examples]:
    return load_examples(PROBLEMS[problem], resources.root, torch.device(resources.device))


def _processes(config: RaceConfig) -> int:
    if torch.device(config.device).type != "cpu":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // config.threads)


# Checks


def _check(study: str, config: RaceConfig) -> tuple[str, ...]:
    """Validate the contestants."""
    if config.problem not in PROBLEMS:
        raise UsageError(f"unknown problem '{config.problem}'{nearest(config.problem, PROBLEMS)}")
    chosen = config.contestants or (AUTOENCODER if study == "autoencoder" else TWO_LEVEL)
    for name in chosen:
        if name not in CONTESTANTS:
            raise UsageError(f"unknown contestant '{name}'{nearest(name, CONTESTANTS)}")
    for name, value in {"seconds": config.seconds, "tuning_seconds": config.tuning_seconds}.items():
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} must be a number above 0, got {value}")
    least = {"seeds": 1, "tuning_trials": 0, "fisher_seconds": 0, "threads": 1, "processes": 1}
    for name, low in least.items():
        given = getattr(config, name)
        if given is not None and not low <= given < math.inf:  # nor NaN
            raise UsageError(f"{name} must be at least {low} and finite, got {given}")
    for name in ("threads", "processes"):
        if (getattr(config, name) or 1) > MOST_WORKERS:
            raise UsageError(f"{name} must be at most {MOST_WORKERS}, got {getattr(config, name)}")
    try:
        torch.empty(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        message = f"device {config.device} can't be used here: {first_line(error)}"
        raise UsageError(message) from None
    optional = config.contestants is None and "soap" in chosen
    if optional and find_spec("pytorch_optimizer") is None:
        chosen = tuple(name for name in chosen if name != "soap")
        warnings.warn(
            "SOAP is skipped: install it with pip install 'smallfry[peers]'",
            SmallfryWarning,
            stacklevel=3,
        )
    for name in chosen:  # such as a library that is missing, before an hour has passed
        model = torch.nn.Linear(2, 2)
        CONTESTANTS[name].build(model, PROBLEMS[config.problem], **CONTESTANTS[name].defaults)
    return tuple(dict.fromkeys(chosen))


def _check_records(
    records: Sequence[dict[str, Any]], config: RaceConfig, resources: Resources
) -> None:
    """Require trials of one race to have the same duration and clock."""
    wanted = {
        "tuning": config.tuning_seconds,
        "tuned": config.seconds,
        "defaults": config.seconds,
        "fisher": config.fisher_seconds,
    }
    for r in records:
        if r["problem"] != config.problem or r["phase"] not in wanted:
            continue
        if r["seconds"] != wanted[r["phase"]] or r["clock"] != resources.clock:
            raise UsageError(
                f"the trials in this folder ran for {r['seconds']:g} s ({r['phase']}, "
                f"{r['clock']} time), not {wanted[r['phase']]:g} s ({resources.clock} time): "
                f"use the same times, or another --folder"
            )
