"""Page of a search: the trials, the best so far beside random search, and how to train the best."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smallfry.io.terminal import command
from smallfry.report.page import image, render, words, write
from smallfry.report.search import Point, draw_search
from smallfry.report.table import NONE, number, table
from smallfry.search.space import Candidate, Trial, key_of
from smallfry.studies.folder import reporting
from smallfry.studies.search.config import SearchConfig
from smallfry.studies.search.importance import importances
from smallfry.studies.search.problem import Problem
from smallfry.training.provenance import provenance

__all__ = ["BEST", "PAGE", "Confirmed", "Predicted", "write_page"]

PAGE, BEST, PICTURE = "index.html", "best.yaml", "search.png"
SHOWN = 200  # trials in the table
Predicted = Mapping[Any, float]


class Confirmed(NamedTuple):
    """Candidate trained again with further seeds."""

    candidate: Candidate
    values: Sequence[float]  # validation accuracy in percent by seed

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return sum(self.values) / len(self.values)


def write_page(
    folder: Path,
    config: SearchConfig,
    problem: Problem,
    found: Mapping[str, Sequence[Trial]],
    best: Trial | None,
    confirmed: Sequence[Confirmed],
    predicted: Predicted,
) -> Path:
    """Write the page with its picture, and return it.

    Args:
        folder: Folder of the search.
        config: Its settings.
        problem: Its problem.
        found: Trials by strategy, that of the search first.
        best: The chosen trial.
        confirmed: Candidates trained with further seeds.
        predicted: Values that the strategy predicted before the measurement, by ``key_of``.

    Raises:
        RunError: It could not be written.
    """
    with reporting(folder):
        (folder / "pictures").mkdir(exist_ok=True)
        chosen = None if best is None else key_of(best.candidate)
        points = {
            label: [
                Point(t.value, t.cost["macs"], key_of(t.candidate) == chosen)
                for t in trials
                if t.value is not None
            ]
            for label, trials in found.items()
        }
        trials = list(next(iter(found.values())))
        picture = None
        if points[config.strategy]:
            shares = importances(problem.architecture + problem.recipe, trials)
            pairs = [
                (predicted[key], t.value)
                for t in trials
                if t.value is not None and (key := key_of(t.candidate)) in predicted
            ]
            file = folder / "pictures" / PICTURE
            draw_search(points, shares, file, problem.measure, pairs)
            picture = image(folder / "pictures" / PICTURE, "trials of the search")
        write(folder / PAGE, _page(config, problem.measure, trials, best, confirmed, picture))
    return folder / PAGE


def _page(
    config: SearchConfig,
    measure: str,
    trials: Sequence[Trial],
    best: Trial | None,
    confirmed: Sequence[Confirmed],
    picture: Any,
) -> str:
    ranked = sorted(trials, key=lambda t: -(t.value if t.value is not None else -1.0))
    seeds = [
        [_text(each.candidate), f"{each.mean:.2f}", " ".join(f"{v:.2f}" for v in each.values)]
        for each in confirmed
    ]
    return render(
        "studies/search/templates/search.html",
        title=f"Search by {config.strategy}: {Path(config.space).name}",
        best=best,
        measure=measure,
        best_text=None if best is None else _text(best.candidate),
        picture=picture,
        trials=table(
            ["candidate", f"{measure}, %", "MMAC", "parameters", "seconds"],
            [_row(trial) for trial in ranked[:SHOWN]],
            marked=[number for number, trial in enumerate(ranked[:SHOWN]) if trial == best],
        ),
        count=len(trials),
        failed=sum(trial.value is None for trial in trials),
        confirmed=table(["candidate", "mean, %", "by seed, %"], seeds) if seeds else None,
        train=None if config.is_table else command("smallfry", "train", "--config", BEST),
        baseline=config.baseline,
        provenance=_provenance(),
    )


def _row(trial: Trial) -> list[Any]:
    value = f"failed: {trial.failure}" if trial.value is None else f"{trial.value:.2f}"
    macs, parameters = (trial.cost.get(name) for name in ("macs", "parameters"))
    return [
        _text(trial.candidate),
        value,
        NONE if macs is None else number(macs / 1e6),
        NONE if parameters is None else f"{parameters:,.0f}",
        number(trial.seconds),
    ]


def _text(candidate: Candidate) -> str:
    return ", ".join(
        f"{name} {number(value) if isinstance(value, float) else words(value)}"
        for name, value in candidate.items()
    )


def _provenance() -> str:
    rows = [
        [name, words(value)]
        for name, value in provenance(torch.device("cpu")).items()
        if value is not None
    ]
    return table(["what", "value"], rows, text=(0, 1))
