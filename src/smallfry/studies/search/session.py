"""Search for a training configuration, in a folder from which it resumes.

search.json    settings
space.yaml     settings and choices of the space
ledger.jsonl   every trial of the search; random.jsonl, those of random search beside it
confirm_N.jsonl  trials with the Nth further seed
policies.safetensors  policies of the strategy n2n
runs/          run folders of the candidates
best.yaml      configuration of the best one
index.html     the page
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from smallfry.data.named import full_name
from smallfry.errors import RunError, UsageError
from smallfry.io.json import strict
from smallfry.io.replace import write_whole
from smallfry.search import NARS, Candidate, Ledger, Listed, Search, Trial
from smallfry.search.ledger import best as best_of
from smallfry.search.n2n import N2N
from smallfry.search.rounds import run_rounds
from smallfry.search.space import key_of
from smallfry.studies.folder import locked, stoppable
from smallfry.studies.search.config import SearchConfig
from smallfry.studies.search.page import BEST, Confirmed, Predicted, write_page
from smallfry.studies.search.problem import Problem, find_problem
from smallfry.studies.search.progress import SearchProgress
from smallfry.studies.search.strategies import build_strategy, limits, why_none
from smallfry.training.config import DataConfig

__all__ = ["Found", "search"]

SETTINGS, SPACE, LEDGER, RANDOM = "search.json", "space.yaml", "ledger.jsonl", "random.jsonl"
POLICIES = "policies.safetensors"  # of the strategy n2n
CONFIRMED = 3  # best candidates that are trained with further seeds
UNCOMPARED = {"space", "baseline", "confirm"}  # the space is compared by its content


class Found(NamedTuple):
    """Result of a search.

    Attributes:
        best: The chosen trial; None if all failed.
        confirmed: Candidates trained with further seeds, best first.
        page: The HTML page.
        measure: What the values of trials are, in percent.
    """

    best: Trial | None
    confirmed: Sequence[Confirmed]
    page: Path
    measure: str = "validation accuracy"


def search(config: SearchConfig, folder: str | Path, quiet: bool = False) -> Found:
    """Search, or continue the search of a folder.

    Args:
        config: Space, data and budget.
        folder: Folder of the search.
        quiet: Show no progress.

    Raises:
        UsageError: An impossible space, limits that no candidate keeps, or a folder with another
            search.
        RunError: The folder is in use, or damaged.
        DataError: The data can't be used.
        Stopped: A signal came; the same call continues.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     found = search(SearchConfig("micro_nars", strategy="random"), folder, quiet=True)
        >>> found.best.value > 50
        True
    """
    folder = Path(folder).expanduser()
    problem = _problem(config, folder)
    note = f"what ended is in {folder}, the same command continues"
    with locked(folder, (SETTINGS,), "search", "--to"), stoppable(note):
        _require_same(config, problem, folder)
        total = config.budget * (1 + config.baseline) + CONFIRMED * config.confirm
        with SearchProgress(total, quiet) as progress:
            trials, predicted = _run(config, problem, folder, progress)
            if not trials:
                raise UsageError(f"{config.space}: {why_none(problem, config)}")
            found: dict[str, list[Trial]] = {config.strategy: trials}
            if config.baseline and config.strategy != "random":
                other = replace(config, strategy="random")
                found["random"], _ = _local(other, problem, folder / RANDOM, progress)
            allowed = limits(problem, config)  # beyond which n2n tries some at first
            within = [trial for trial in trials if allowed(trial.candidate)]
            confirmed = _confirm(config, problem, within, folder, progress)
        best = best_of(within)
        if confirmed:
            first = key_of(confirmed[0].candidate)
            best = next(trial for trial in trials if key_of(trial.candidate) == first)
        _write_best(problem, best, folder)
        page = write_page(folder, config, problem, found, best, confirmed, predicted)
        return Found(best, confirmed, page, problem.measure)


def _problem(config: SearchConfig, folder: Path) -> Problem:
    """Find the problem, which may be that of a teacher's students.

    Raises:
        UsageError: As ``find_problem``, or data beside a teacher.
    """
    teacher = Path(config.space).expanduser()
    if config.is_table or not teacher.is_dir():
        return find_problem(config)
    from smallfry.studies.search.student_problem import StudentProblem

    if config.data != DataConfig():
        raise UsageError(f"{teacher}: students learn from their teacher's data: leave out data")
    return StudentProblem(teacher, folder, config.student_epochs, config.workers)


def _run(
    config: SearchConfig, problem: Problem, folder: Path, progress: SearchProgress
) -> tuple[list[Trial], Predicted]:
    """Run the strategy; returns the trials, and the values that it predicted, if it does."""
    if config.engine == "local":
        return _local(config, problem, folder / LEDGER, progress)
    from smallfry.studies.search.optuna_engine import run_on_storage

    return run_on_storage(config, problem.text, folder, progress), {}


def _local(
    config: SearchConfig, problem: Problem, ledger: Path, progress: SearchProgress
) -> tuple[list[Trial], Predicted]:
    strategy = build_strategy(config.strategy, problem, config)
    trials = _rounds(config, problem, strategy, ledger, "runs", progress)
    if isinstance(strategy, N2N):
        strategy.save_policies(ledger.parent / POLICIES)
    return trials, strategy.predicted if isinstance(strategy, NARS) else {}


def _rounds(
    config: SearchConfig,
    problem: Problem,
    strategy: Search,
    ledger: Path,
    runs: str,
    progress: SearchProgress,
) -> list[Trial]:
    """Run a strategy from its ledger; its runs are in a folder beside it.

    Raises:
        RunError: A trial of the ledger lacks costs, or is of another search.
    """
    log = Ledger(ledger)
    for trial in log.read():
        if trial.value is not None and "macs" not in trial.cost:
            raise RunError(
                f"{ledger}: damaged, the trial of {dict(trial.candidate)} lacks its macs; remove "
                "its line and those after it"
            )
        progress.end(trial, fresh=False)

    def evaluate(candidates: Sequence[Candidate]) -> Iterator[Trial]:
        for trial in problem.evaluate(candidates, ledger.parent / runs, config.seed):
            progress.end(trial)
            yield trial

    return run_rounds(strategy, evaluate, log, config.workers)


def _confirm(
    config: SearchConfig,
    problem: Problem,
    trials: Sequence[Trial],
    folder: Path,
    progress: SearchProgress,
) -> list[Confirmed]:
    """Train the best candidates with further seeds, and sort them by failures and mean."""
    valued = [trial for trial in trials if trial.value is not None]
    ranked = sorted(valued, key=lambda trial: -(trial.value or 0.0))[:CONFIRMED]
    if not config.confirm or not ranked:
        return []
    values: Mapping[Any, list[float]] = {key_of(trial.candidate): [] for trial in ranked}
    for number in range(1, config.confirm + 1):
        again = replace(config, seed=config.seed + number)
        listed = Listed([trial.candidate for trial in ranked])
        ledger, runs = folder / f"confirm_{number}.jsonl", f"runs_{number}"
        for trial in _rounds(again, problem, listed, ledger, runs, progress):
            if trial.value is not None:
                values[key_of(trial.candidate)].append(trial.value)
    found = [Confirmed(t.candidate, values[key_of(t.candidate)]) for t in ranked]
    trained = (each for each in found if each.values)
    return sorted(trained, key=lambda each: (-len(each.values), -each.mean))


def _write_best(problem: Problem, best: Trial | None, folder: Path) -> None:
    """Write the configuration of the best candidate, if it is one of training."""
    training = None if best is None else problem.config(best.candidate)
    if training is not None:
        text = yaml.safe_dump(training.to_dict(), sort_keys=False, allow_unicode=True)
        write_whole(folder / BEST, text.encode())


def _require_same(config: SearchConfig, problem: Problem, folder: Path) -> None:
    """Write the settings of a new search, or compare those of an earlier one.

    Raises:
        UsageError: They differ.
        RunError: The files are damaged.
    """
    now = {k: v for k, v in strict(asdict(config)).items() if k not in UNCOMPARED}
    now["data"].pop("root")
    now["data"]["name"] = full_name(config.data.name)
    files = (folder / SETTINGS, (json.dumps(now, indent=1) + "\n")), (folder / SPACE, problem.text)
    for file, content in files:  # the first marks the folder as one of a search
        if not file.exists():
            write_whole(file, content.encode())
    try:
        before = dict(json.loads((folder / SETTINGS).read_text()))
        before["data"]["name"] = full_name(before["data"]["name"])  # was kept as given
        text = (folder / SPACE).read_text()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{folder}: damaged ({error}); use another --to") from error
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise UsageError(
                f"{folder} holds a search with {name} {before.get(name)}, not {now.get(name)}: use "
                "the same settings to continue it, or another --to"
            )
    if text != problem.text:
        raise UsageError(f"{folder} holds a search in another space: use another --to")
