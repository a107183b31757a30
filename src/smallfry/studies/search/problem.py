"""Problem of a search: its space, and the costs and the evaluation of candidates."""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from hashlib import sha256
from multiprocessing import active_children, get_context
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, runtime_checkable

import yaml

from smallfry.errors import RunError, Stopped, UsageError, first_line
from smallfry.io.signals import Signalled, leave_to_parent, raising
from smallfry.search.evaluation import train_candidate
from smallfry.search.n2n import Layer
from smallfry.search.settings_space import SettingsSpace, read_settings_space
from smallfry.search.space import Candidate, Choice, Trial, key_of
from smallfry.search.tables import TABLES, TableEvaluator, load_table, micro_n2n, micro_nars
from smallfry.studies.search.config import SearchConfig
from smallfry.training.config import TrainConfig
from smallfry.training.progress import QuietReporter

__all__ = [
    "HasTeacher",
    "Problem",
    "StudentTable",
    "TableProblem",
    "TrainingProblem",
    "find_problem",
    "run_name",
    "seed_of",
    "train_all",
]

Job = tuple[Candidate, TrainConfig, Mapping[str, float]]


class Problem(Protocol):
    """Space with costs and an evaluation."""

    architecture: tuple[Choice, ...]  # choices on which costs depend
    recipe: tuple[Choice, ...]
    text: str  # of the space, by which a resumed search is compared
    measure: str  # what the value of a trial is, in percent

    def costs(self, candidate: Candidate) -> Mapping[str, float]:
        """Return macs and parameters.

        Raises:
            UsageError: There is no such model.
        """

    def evaluate(self, candidates: Sequence[Candidate], folder: Path, seed: int) -> Iterator[Trial]:
        """Yield the trials of candidates as they end; runs are folders in ``folder``."""

    def config(self, candidate: Candidate) -> TrainConfig | None:
        """Return the training of a candidate, if there is one."""


@runtime_checkable
class HasTeacher(Protocol):
    """Problem whose candidates are students of one teacher."""

    layers: tuple[Layer, ...]  # of the teacher

    def reward(self, trial: Trial) -> float:
        """Return the reward of a student's trial, about 0 to 1."""


class TableProblem:
    """Table of trained networks, which needs no training; each evaluation is one of them.

    Args:
        name: Of the table.
    """

    measure = "validation accuracy"

    def __init__(self, name: str) -> None:
        self.table, self.text = load_table(name), f"table: {name}\n"
        joint = name == "micro_nars"
        self.architecture: tuple[Choice, ...] = micro_nars.ARCHITECTURE if joint else TABLES[name]
        self.recipe: tuple[Choice, ...] = micro_nars.RECIPE if joint else ()

    def costs(self, candidate: Candidate) -> Mapping[str, float]:
        """Return macs and parameters."""
        recipe = {choice.name: choice.values[0] for choice in self.recipe}
        return TableEvaluator(self.table)({**recipe, **candidate}).cost

    def evaluate(self, candidates: Sequence[Candidate], folder: Path, seed: int) -> Iterator[Trial]:
        """Yield a training of each candidate."""
        yield from map(TableEvaluator(self.table, seed=seed), candidates)

    def config(self, candidate: Candidate) -> None:
        """Return nothing, as these networks have no run."""


class StudentTable(TableProblem):
    """Table of all students of a teacher, valued by N2N's reward in percent."""

    measure = "reward"
    layers = micro_n2n.LAYERS

    def __init__(self) -> None:
        super().__init__("micro_n2n")

    def reward(self, trial: Trial) -> float:
        """Return the reward of a trial."""
        assert trial.value is not None
        return trial.value / 100

    def evaluate(self, candidates: Sequence[Candidate], folder: Path, seed: int) -> Iterator[Trial]:
        """Yield a training of each student."""
        for trial in super().evaluate(candidates, folder, seed):
            assert trial.value is not None
            accuracy, parameters = trial.value / 100, trial.cost["parameters"]
            value = 100 * self.table.rewards(accuracy, parameters)
            measured = {**trial.measured, "accuracy": accuracy}
            yield replace(trial, value=float(value), measured=measured)


class TrainingProblem:
    """Training configurations, by some of their settings.

    Args:
        space: The space.
        workers: Processes, each of which trains a candidate.
    """

    measure = "validation accuracy"

    def __init__(self, space: SettingsSpace, workers: int = 1) -> None:
        self.space, self.workers = space, workers
        self.architecture, self.recipe = space.architecture, space.recipe
        choices = {choice.name: _written(choice) for choice in space.choices}
        settings = {name: value for name, value in space.settings.items() if name != "data"}
        content = {"settings": settings, "choices": choices}
        self.text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def costs(self, candidate: Candidate) -> Mapping[str, float]:
        """Return macs and parameters."""
        return self.space.costs(candidate)

    def config(self, candidate: Candidate) -> TrainConfig:
        """Return the training of a candidate."""
        return self.space.train(candidate)

    def evaluate(self, candidates: Sequence[Candidate], folder: Path, seed: int) -> Iterator[Trial]:
        """Yield the trials of candidates as they end, in several processes if there are some."""
        jobs = []
        for each in candidates:
            own = seed_of(each, seed)
            try:
                config = replace(self.space.train(each), run=folder / run_name(each), seed=own)
            except RunError as error:  # values that are no settings
                yield Trial(each, None, own, failure=first_line(error))
            else:
                jobs.append((each, config, self.space.costs(each)))
        yield from train_all(jobs, self.workers)


def train_all(jobs: Sequence[Job], workers: int) -> Iterator[Trial]:
    """Train candidates, and yield their trials as they end.

    Args:
        jobs: Candidates, their trainings and their costs.
        workers: Processes.

    Raises:
        Stopped: A signal came; the state of all trainings is saved.
        RunError: A process was killed.
    """
    if workers == 1:
        yield from (_train(*job) for job in jobs)
        return
    others = {*active_children()}
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepare)
    try:
        for done in as_completed([pool.submit(_train_stoppably, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that trained a candidate was killed, perhaps for lack of memory: try fewer "
            "workers; the same command continues"
        ) from error
    except BaseException:  # such as a signal, which only this process may have received
        for child in {*active_children()} - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def find_problem(config: SearchConfig) -> Problem:
    """Find the problem of a search whose space is a table or a file.

    Raises:
        UsageError: There is no such table, file or data, or it is no space.
        DataError: The data can't be used.
        RunError: Its settings are not of this version.
    """
    if config.is_table:
        return StudentTable() if config.space == "micro_n2n" else TableProblem(config.space)
    file = Path(config.space).expanduser()
    if not file.is_file():
        raise UsageError(
            f"{config.space}: no such file; a space is a YAML file, the folder of a run, or one of "
            f"{', '.join(TABLES)}"
        )
    space = read_settings_space(file)
    if "data" in space.settings:
        raise UsageError(f"{file}: the data is no setting of a space; give it by --data")
    space = space.with_data(config.data)
    _ = space.data  # as no candidate can be trained without it
    return TrainingProblem(space, config.workers)


def run_name(candidate: Candidate) -> str:
    """Return the name of a candidate's run folder.

    Example:
        >>> run_name({"optimizer.lr": 0.1})
        '5739a7061c'
    """
    return sha256(repr(key_of(candidate)).encode()).hexdigest()[:10]


def seed_of(candidate: Candidate, seed: int) -> int:
    """Return a seed of a candidate's training, as one seed for all favours those it suits."""
    return (seed + int(run_name(candidate), 16)) % 2**31


def _train(candidate: Candidate, config: TrainConfig, cost: Mapping[str, float]) -> Trial:
    began = monotonic()
    trial = train_candidate(candidate, config, cost, QuietReporter())
    return replace(trial, seconds=monotonic() - began)


def _prepare() -> None:
    """Leave Ctrl-C to the parent, which ends its children by SIGTERM."""
    leave_to_parent(but={signal.SIGTERM})


def _train_stoppably(*job: Any) -> Trial:
    """Train a candidate; at a signal, save it and end the process, which gets no other one."""
    try:
        with raising():
            return _train(*job)
    except (Stopped, Signalled) as stop:
        os._exit(128 + stop.signal_number)


def _written(choice: Choice) -> dict[str, object]:
    """Return a choice as in a file of a space."""
    written: dict[str, object] = {"values": list(choice.values)}
    if not choice.values:
        written = {"low": choice.low, "high": choice.high, "log": choice.log}
        written["whole"] = choice.whole
    when = {name: list(values) for name, values in choice.when.items()}
    return written | ({"when": when} if when else {})
