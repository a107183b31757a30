"""Fit: the most accurate model under a budget, from images to an export."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.data import ImageData
from smallfry.deploy.targets import find_target, require_installed
from smallfry.errors import DataError, RunError, Stopped
from smallfry.fitting.compressing import Exports, finalists
from smallfry.fitting.config import FitConfig
from smallfry.fitting.costs import build
from smallfry.fitting.folder import (
    EXPORT,
    FIT,
    NEAREST,
    PAGE,
    PLAN,
    TRIALS,
    read_result,
    write_result,
)
from smallfry.fitting.page import write_page
from smallfry.fitting.plan import Plan, read_plan
from smallfry.fitting.planning import find_pretrained, make_plan, needed
from smallfry.fitting.progress import FitProgress
from smallfry.fitting.rungs import FitSpace, build_search, run_name, train_rung
from smallfry.fitting.verify import Verified, choose, nearest, predict, score
from smallfry.io.replace import replacing
from smallfry.search import RUNG, Candidate, Ledger, Trial, replay, run
from smallfry.studies.folder import locked, stoppable
from smallfry.training.evaluation_data import load_config_data
from smallfry_runtime.runtime import Runtime

Tell = Callable[[str], None]
FIGURES = frozenset({"accuracy", "loss", "epochs", "kb", "ms"})  # of a trial that did not fail


class Fitted(NamedTuple):
    """Result of a fit.

    Attributes:
        met: True if the budget, and the accuracy if one was asked for, are met.
        summary: Plain data: the chosen export, its test accuracy, and what lacks.
        page: The HTML page.
    """

    met: bool
    summary: Mapping[str, Any]
    page: Path


def fit(config: FitConfig, folder: str | Path, tell: Tell = print, quiet: bool = False) -> Fitted:
    """Fit a model, or go on with what the folder has.

    Args:
        config: Data, budget and time.
        folder: Folder of the fit.
        tell: Receiver of a line for each step of the plan.
        quiet: Show no progress.

    Raises:
        UsageError: No budget, an unknown name or one that is not installed, too few minutes, or a
            folder of another fit.
        DataError: The images can't be used.
        NothingFits: No candidate is near the budget.
        Stopped: A signal came; the same call goes on.

    Example:
        >>> from smallfry.fitting.config import FitConfig  # doctest: +SKIP
        >>> from smallfry.fitting.run import fit  # doctest: +SKIP
        >>> fit(FitConfig(max_kb=20, minutes=3), "fits/digits").met  # doctest: +SKIP
        True
    """
    folder = Path(folder).expanduser()
    config.require_budget()
    require_installed(find_target(config.target))
    result = read_result(config, folder)
    if result is not None:
        return Fitted(result["met"], result, folder / PAGE)
    data = load_images(config)
    note = f"what ended is in {folder}, the same command goes on"
    with locked(folder, (FIT,), "fit", "--to"), _going_on(note), stoppable(note):
        write_result(config, folder, None)
        plan = _plan(config, data, folder, tell)
        starts = find_pretrained(config, data)[0]
        space = FitSpace(plan, config, data, starts, lambda each: build(each.entry, data).spec)
        trials, exports = _train_and_export(space, folder, quiet)
        return _conclude(space, trials, exports, folder)


def load_images(config: FitConfig) -> ImageData:
    """Load the images of a fit.

    Raises:
        DataError: They can't be used, or a split is empty.
    """
    data = load_config_data(config.data)
    for name, count in {"validation": len(data.validation), "test": data.test_count}.items():
        if count == 0:
            raise DataError(
                f"{data.origin}: there are no {name} images; give each class more images, or raise "
                f"data.{name}"
            )
    _ = data.test  # decoded now, as a broken image is better found before the training than after
    return data


@contextmanager
def _going_on(note: str) -> Iterator[None]:
    """Replace the message of a stopped training by that of the fit."""
    try:
        yield
    except Stopped as stop:
        raise Stopped(stop.signal_number, f"stopped; {note}") from None


def _plan(config: FitConfig, data: ImageData, folder: Path, tell: Tell) -> Plan:
    """Read the plan, or make it.

    Raises:
        DataError: It is of other data.
    """
    plan = read_plan(folder / PLAN)
    if plan is None:
        plan = make_plan(config, data, tell)
        plan.write(folder / PLAN)
    if not data.matches(plan.fingerprint):
        raise DataError(
            f"{folder}: its fit began on other data than {data.origin} gives now (fingerprint "
            f"{plan.fingerprint}, now {data.fingerprint}); bring that data back, or use another "
            "--to"
        )
    return plan


def _train_and_export(
    space: FitSpace, folder: Path, quiet: bool
) -> tuple[list[Trial], list[Verified]]:
    """Run all rungs, and compress, export and verify the best."""
    plan, ledger = space.plan, Ledger(folder / TRIALS)
    exports = Exports(folder, space)
    known, made = _known_trials(space, ledger), len(exports.read())
    total = sum(plan.counts) + max(2, made)
    seconds = (plan.seconds + plan.tuning_seconds) / plan.threads
    with FitProgress(total, seconds, quiet) as progress:
        for trial in known:
            _note_trial(trial, progress, plan, fresh=False)

        def evaluate(candidate: Candidate) -> Trial:
            epochs = plan.epochs(space.planned(candidate).name, int(candidate[RUNG]))
            reporter = progress.run(run_name(candidate), epochs)
            trial = train_rung(space, candidate, folder / "runs", reporter)
            _note_trial(trial, progress, plan, fresh=True)
            return trial

        trials = run(build_search(space), evaluate, ledger)
        found = []
        for number, each in enumerate(exports.make(finalists(trials, space), progress.run)):
            progress.total = max(progress.total, len(trials) + number + 1)
            progress.end(_described(each), each.name, None, fresh=number >= made)
            found.append(each)
    return trials, found


def _known_trials(space: FitSpace, ledger: Ledger) -> list[Trial]:
    """Read the trials of earlier processes.

    Raises:
        RunError: One is damaged, or none of this fit.
    """
    known = ledger.read()
    replay(build_search(space), known)
    for trial in known:
        lacking = FIGURES - {*trial.measured, *trial.cost}
        if lacking and trial.value is not None:
            raise RunError(
                f"{ledger.file}: damaged, the trial of {run_name(trial.candidate)} lacks "
                f"{', '.join(sorted(lacking))}; remove its line and those after it"
            )
    return known


def _note_trial(trial: Trial, progress: FitProgress, plan: Plan, fresh: bool) -> None:
    name = run_name(trial.candidate)
    before = int(trial.candidate[RUNG])
    planned = plan.find(str(trial.candidate["model"]))
    earlier = plan.epochs(planned.name, before - 1) if before else 0
    seconds = (plan.epochs(planned.name, before) - earlier) * planned.epoch_seconds / plan.threads
    if trial.value is None:
        progress.end(f"{name}: failed: {trial.failure}", name, None, seconds, fresh)
        return
    measured = trial.measured
    text = f"{name}, {measured['epochs']} epochs: validation {measured['accuracy']:.2%}"
    progress.end(text, name, 100 * measured["accuracy"], seconds, fresh)


def _described(each: Verified) -> str:
    if each.accuracy is None:
        return f"{each.name}: failed: {each.failure}"
    text = f"{each.name}: exported, {each.kb:.3g} kB, {each.ms:.3g} ms"
    return f"{text}, validation {each.accuracy:.2%}"


def _conclude(
    space: FitSpace, trials: Sequence[Trial], exports: list[Verified], folder: Path
) -> Fitted:
    """Choose an export, test it once, and write result and page."""
    config, budget = space.config, space.config.budget
    chosen = choose(exports, budget)
    taken = chosen or nearest(exports, budget)
    test: dict[str, Any] | None = None
    probabilities: NDArray[np.float32] | None = None
    if taken is not None:
        name = EXPORT if chosen is not None else NEAREST
        place = _put_in_place(folder, taken, name)
        answering = Runtime(place, threads=1)
        images = space.data.test
        probabilities = predict(answering, images, taken.exit_threshold)
        test = {**score(probabilities, images), "images": len(images)}
        taken = replace(taken, export=name)
    lacks = _lacks(config, chosen, taken, test, exports)
    summary = {
        "met": lacks is None,
        "lacks": lacks,
        "chosen": None if taken is None else taken.to_dict(),
        "test": test,
        "validation_images": len(space.data.validation),
    }
    page = write_page(folder, space, trials, exports, summary, probabilities)
    write_result(config, folder, summary)
    return Fitted(lacks is None, summary, page)


def _put_in_place(folder: Path, taken: Verified, name: str) -> Path:
    """Copy an export to its place in the fit's folder."""
    assert taken.export is not None
    with replacing(folder / name) as new:
        shutil.copytree(folder / taken.export, new, dirs_exist_ok=True)
    return folder / name


def _lacks(
    config: FitConfig,
    chosen: Verified | None,
    taken: Verified | None,
    test: Mapping[str, Any] | None,
    exports: Sequence[Verified],
) -> str | None:
    """Describe what is not met, and what would have to give; None if all is met."""
    if taken is None:
        failures = [each.failure for each in exports if each.failure]
        return f"no candidate could be exported: {failures[0] if failures else 'none was trained'}"
    if chosen is None:
        assert taken.kb is not None
        assert taken.ms is not None
        return (
            f"no export is within {config.budget}: the nearest has {taken.kb:.4g} kB and "
            f"{taken.ms:.3g} ms; allow {needed(taken.kb, taken.ms, config.budget)}"
        )
    assert test is not None
    if config.min_accuracy is None or 100 * test["accuracy"] >= config.min_accuracy:
        return None
    better = [e for e in exports if e.accuracy is not None and e.value > chosen.value]
    text = (
        f"the test accuracy is {test['accuracy']:.2%}, not {config.min_accuracy:g} %: allow more "
        f"--minutes than {config.minutes:g}, or a larger budget than {config.budget}"
    )
    if better:
        best = max(better, key=lambda each: each.value)
        text += (
            f" ({best.name} had {best.accuracy:.2%} of the validation images with {best.kb:.4g} "
            f"kB and {best.ms:.3g} ms)"
        )
    return text
