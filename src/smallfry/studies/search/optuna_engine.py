"""Search on Optuna's storage, which processes of several machines share.

Every process runs the same study; what one has trained, the others learn from. The storage is the
ledger: a search goes on where it was stopped, by the same command.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallfry.errors import RunError, UsageError
from smallfry.io.json import strict
from smallfry.search import Ledger, Trial
from smallfry.search.sampling import all_candidates
from smallfry.search.tpe import suggest_candidate
from smallfry.studies.search.config import SearchConfig
from smallfry.studies.search.problem import find_problem, run_name
from smallfry.studies.search.progress import SearchProgress
from smallfry.studies.search.strategies import limits

if TYPE_CHECKING:
    import optuna

__all__ = ["run_on_storage"]

STUDY = "smallfry"
LEDGER = "ledger.jsonl"
SECONDS = 2.0  # between looks at the storage
TRIAL = "trial"  # attribute of Optuna's trials: ours, as plain data
NAME = "name"  # attribute of Optuna's trials: that of the candidate's run
SEARCHED = "searched"  # attribute of Optuna's study: digest of the space and the data
ENUMERATED = 256  # candidates of a space that is small enough to be trained whole
COUNTED = ("COMPLETE", "FAIL", "RUNNING")  # states of trials that are of the budget
MOST_REJECTED = 2000  # proposals in a row that are not allowed, after which none seems left


def run_on_storage(
    config: SearchConfig, space: str, folder: Path, progress: SearchProgress
) -> list[Trial]:
    """Run a search in as many processes as it has workers, beside those of other machines.

    Args:
        config: The search's settings.
        space: Settings and choices, as written into the folder.
        folder: Folder of the search.
        progress: Receiver of trials.

    Returns:
        All trials of the study, also those of other machines; the ledger in the folder has them.

    Raises:
        UsageError: The storage can't be used, or has the trials of another search.
        RunError: A worker failed.
        ModuleNotFoundError: Optuna is not installed.
    """
    study = open_study(config, 0)
    require_same(study, config, space)
    known = trials_of(study)
    for trial in known.values():
        progress.end(trial, fresh=False)
    for number, trial in _new_trials(config, folder, study, {*known}):
        progress.end(trial)
        known[number] = trial
    trials = [known[number] for number in sorted(known)]
    ledger = Ledger(folder / LEDGER)
    ledger.file.unlink(missing_ok=True)
    for trial in trials:
        ledger.append(trial)
    return trials


def require_same(study: "optuna.Study", config: SearchConfig, space: str) -> None:
    """Mark a new study as that of a space and data, or compare them.

    Raises:
        UsageError: The study is that of another space, or of other data.
    """
    data = {k: v for k, v in strict(asdict(config.data)).items() if k != "root"}
    data["name"] = Path(config.data.name).name  # a folder may be elsewhere on another machine
    content = json.dumps([space, data], sort_keys=True)
    here = hashlib.sha256(content.encode()).hexdigest()
    if study.user_attrs.get(SEARCHED, here) != here:
        raise UsageError(
            f"storage {config.storage}: has the trials of another space or of other data; use "
            "another storage"
        )
    study.set_user_attr(SEARCHED, here)


def _new_trials(
    config: SearchConfig, folder: Path, study: "optuna.Study", known: set[int]
) -> Iterator[tuple[int, Trial]]:
    """Run the workers, and yield the study's new trials until all workers have ended."""
    context = get_context("spawn")
    workers = [
        context.Process(target=work, args=(config, folder, number))
        for number in range(config.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        while True:
            is_over = not any(worker.is_alive() for worker in workers)
            for number, trial in trials_of(study).items():
                if number not in known:
                    known.add(number)
                    yield number, trial
            if is_over:
                break
            wait([worker.sentinel for worker in workers if worker.is_alive()], SECONDS)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    if failed := sum(worker.exitcode != 0 for worker in workers):
        raise RunError(
            f"{failed} of {config.workers} workers ended with an error, which is above; the same "
            "command continues"
        )


def work(config: SearchConfig, folder: Path, number: int) -> None:
    """Train candidates of the study until the budget is spent.

    Args:
        config: The search's settings.
        folder: Folder of the runs.
        number: Of this process, for its sampler's seed.
    """
    import optuna

    problem, study = find_problem(replace(config, workers=1)), open_study(config, number)
    allowed, choices = limits(problem, config), problem.architecture + problem.recipe
    every = all_candidates(choices, ENUMERATED)
    budget = config.budget if every is None else min(config.budget, sum(map(allowed, every)))
    rejected = 0
    while rejected < MOST_REJECTED and counted(study.get_trials(deepcopy=False)) < budget:
        asked = study.ask()
        candidate = suggest_candidate(asked, choices, allowed)
        asked.set_user_attr(NAME, run_name(candidate))
        others = [each for each in study.get_trials(deepcopy=False) if each.number < asked.number]
        if not allowed(candidate) or run_name(candidate) in names_of(others):
            rejected += 1
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            continue
        rejected = 0
        if counted(others) >= budget:  # another process was faster
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            return
        try:
            trial = next(problem.evaluate([candidate], folder / "runs", config.seed))
        except BaseException:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            raise
        asked.set_user_attr(TRIAL, strict(trial.to_dict()))
        failed = None if trial.value is not None else optuna.trial.TrialState.FAIL
        study.tell(asked, trial.value, state=failed)


def open_study(config: SearchConfig, number: int) -> "optuna.Study":
    """Open the study on its storage, or create it.

    Args:
        config: The search's settings.
        number: Of the process, for its sampler's seed.

    Raises:
        UsageError: The storage can't be used.
    """
    import optuna

    assert config.storage is not None
    logging.getLogger("optuna").setLevel(logging.WARNING)
    seed = (config.seed + number) % 2**32
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    try:
        storage: Any = config.storage
        if "://" not in config.storage:
            backend = optuna.storages.journal.JournalFileBackend(config.storage)
            storage = optuna.storages.JournalStorage(backend)
        return optuna.create_study(
            storage=storage,
            study_name=STUDY,
            direction="maximize",
            sampler=samplers[config.strategy](),
            load_if_exists=True,
        )
    except Exception as error:  # of any of the storages' libraries
        reason = " ".join(str(error).split())
        raise UsageError(f"storage {config.storage}: can't be used ({reason})") from error


def counted(trials: Sequence["optuna.trial.FrozenTrial"]) -> int:
    """Count the trials that are trained or being trained."""
    return sum(each.state.name in COUNTED for each in trials)


def names_of(trials: Sequence["optuna.trial.FrozenTrial"]) -> set[str | None]:
    """Return the names of the candidates that are trained or being trained."""
    return {each.user_attrs.get(NAME) for each in trials if each.state.name in COUNTED}


def trials_of(study: "optuna.Study") -> dict[int, Trial]:
    """Return the trials that ended by their numbers."""
    return {
        each.number: Trial(**each.user_attrs[TRIAL])
        for each in study.get_trials(deepcopy=False)
        if TRIAL in each.user_attrs
    }
