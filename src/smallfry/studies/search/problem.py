"""Problem of a search: its space, what candidates cost, and how they are evaluated."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Protocol

import yaml

from smallfry.errors import UsageError
from smallfry.search.evaluation import train_candidate
from smallfry.search.settings_space import SettingsSpace, read_settings_space
from smallfry.search.space import Candidate, Choice, Trial, key_of
from smallfry.search.tables import TABLES, TableEvaluator, load_table, micro_nars
from smallfry.studies.search.config import SearchConfig
from smallfry.training.config import TrainConfig
from smallfry.training.progress import QuietReporter

__all__ = ["Problem", "TableProblem", "TrainingProblem", "find_problem", "run_name"]


class Problem(Protocol):
    """Space with costs and an evaluation."""

    architecture: tuple[Choice, ...]  # choices on which costs depend
    recipe: tuple[Choice, ...]
    text: str  # of the space, by which a resumed search is compared

    def costs(self, candidate: Candidate) -> Mapping[str, float]:
        """Return macs and parameters.

        Raises:
            UsageError: There is no such model.
        """

    def evaluate(self, candidates: Sequence[Candidate], folder: Path, seed: int) -> Iterator[Trial]:
        """Yield the trials of candidates as they end; runs are folders in ``folder``."""

    def config(self, candidate: Candidate) -> TrainConfig | None:
        """Return the training of a candidate, if there is one."""


class TableProblem:
    """Table of trained networks, which needs no training; each evaluation is one of them.

    Args:
        name: Of the table.
    """

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


class TrainingProblem:
    """Training configurations that differ in some settings.

    Args:
        space: The space.
        workers: Processes, each of which trains a candidate.
    """

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
            run = folder / run_name(each)
            config = replace(self.space.train(each), run=run, seed=_seed(each, seed))
            jobs.append((each, config, self.space.costs(each)))
        if self.workers == 1:
            yield from (_train(*job) for job in jobs)
            return
        with ProcessPoolExecutor(self.workers, get_context("spawn")) as pool:
            for done in as_completed([pool.submit(_train, *job) for job in jobs]):
                yield done.result()


def find_problem(config: SearchConfig) -> Problem:
    """Find the problem of a search.

    Raises:
        UsageError: There is no such table or file, or it is no space.
        RunError: Its settings are not of this version.
    """
    if config.is_table:
        return TableProblem(config.space)
    file = Path(config.space).expanduser()
    if not file.is_file():
        raise UsageError(
            f"{config.space}: no such file; a space is a YAML file, or one of {', '.join(TABLES)}"
        )
    space = read_settings_space(file)
    if "data" in space.settings:
        raise UsageError(f"{file}: the data is no setting of a space; give it by --data")
    return TrainingProblem(space.with_data(config.data), config.workers)


def run_name(candidate: Candidate) -> str:
    """Return the name of a candidate's run folder.

    Example:
        >>> run_name({"optimizer.lr": 0.1})
        '5739a7061c'
    """
    return sha256(repr(key_of(candidate)).encode()).hexdigest()[:10]


def _seed(candidate: Candidate, seed: int) -> int:
    """Return a seed of a candidate's training, as one seed for all favours those it suits."""
    return (seed + int(run_name(candidate), 16)) % 2**31


def _train(candidate: Candidate, config: TrainConfig, cost: Mapping[str, float]) -> Trial:
    began = monotonic()
    trial = train_candidate(candidate, config, cost, QuietReporter())
    return replace(trial, seconds=monotonic() - began)


def _written(choice: Choice) -> dict[str, object]:
    """Return a choice as in a file of a space."""
    written: dict[str, object] = {"values": list(choice.values)}
    if not choice.values:
        written = {"low": choice.low, "high": choice.high, "log": choice.log}
        written["whole"] = choice.whole
    when = {name: list(values) for name, values in choice.when.items()}
    return written | ({"when": when} if when else {})
