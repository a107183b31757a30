"""Training of candidates, rung by rung: each goes on exactly where its last rung ended."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smallfry.data import ImageData
from smallfry.errors import RunError
from smallfry.fitting.config import FitConfig
from smallfry.fitting.plan import Plan, Planned
from smallfry.fitting.recipe import CHOICES, recipe
from smallfry.io.numbers import exact
from smallfry.search import RUNG, TPE, Candidate, Choice, Halving, Listed, Search, Trial, encode
from smallfry.search.evaluation import train_candidate
from smallfry.training.config import TrainConfig
from smallfry.training.progress import Reporter
from smallfry.transforms.spec import ModelSpec

MODEL = "model"  # entry of candidates: the name of one that is planned


class FitSpace:
    """Planned architectures with settings of their training.

    Args:
        plan: The plan.
        config: The fit's settings.
        data: The images.
        starts: Trained models to start from, by name.
        specs: Models by candidate's name.
    """

    def __init__(
        self,
        plan: Plan,
        config: FitConfig,
        data: ImageData,
        starts: Mapping[str | None, Path],
        specs: Callable[[Planned], ModelSpec],
    ) -> None:
        self.plan, self.config, self.data = plan, config, data
        self.starts, self.specs = starts, specs
        for each in plan.candidates:
            if each.entry.start is not None and each.entry.start not in starts:
                raise RunError(
                    f"the fit was begun with {each.entry.start} of results/models to start from, "
                    "which is not here: go on in the folder in which it was begun, or begin another"
                )
        names = tuple(each.name for each in plan.candidates)
        self.choices: tuple[Choice, ...] = (Choice(MODEL, names), *CHOICES)

    def planned(self, candidate: Candidate) -> Planned:
        """Return the planned architecture of a candidate."""
        return self.plan.find(candidate[MODEL])

    def spec(self, candidate: Candidate) -> ModelSpec:
        """Return the model of a candidate, with the data's classes and size."""
        return self.specs(self.planned(candidate))

    def train(self, candidate: Candidate) -> TrainConfig:
        """Return the training of a candidate until the end of its rung."""
        planned = self.planned(candidate)
        return recipe(
            planned.entry,
            self.config,
            self.data,
            threads=self.plan.threads,
            epochs=self.plan.epochs(planned.name, int(candidate.get(RUNG, 0))),
            precision=planned.precision,
            start=self.starts.get(planned.entry.start),
            changes=candidate,
        )

    def encode(self, candidate: Candidate) -> Any:
        """Encode a candidate for a predictor, (numbers,)."""
        return encode(self.choices, candidate)


def build_search(space: FitSpace) -> Search:
    """Build the search of a fit: the first rung listed or proposed, then successive halving."""
    plan, config = space.plan, space.config
    if config.search == "tpe":
        first: Search = TPE(space.choices, plan.counts[0], config.seed)
    else:
        first = Listed([{MODEL: each.name} for each in plan.candidates])
    return Halving(first, plan.counts[1:])


def run_name(candidate: Candidate) -> str:
    """Return the name of a candidate's run folder, the same in all rungs."""
    name = str(candidate[MODEL])
    for choice in CHOICES:
        if choice.name in candidate:
            value = candidate[choice.name]
            name += f"-{exact(value) if isinstance(value, float) else value}"
    return name


def train_rung(
    space: FitSpace, candidate: Candidate, folder: Path, reporter: Reporter | None = None
) -> Trial:
    """Train a candidate to the end of its rung, from where it was stopped.

    Args:
        space: The space.
        candidate: With its rung.
        folder: Folder of all runs.
        reporter: Receiver of progress.

    Returns:
        A trial, whose value is the validation accuracy in percent, less a little of the loss; one
        without a value if the training failed.

    Raises:
        Stopped: A signal came; the state is saved.
    """
    planned, config = space.planned(candidate), space.train(candidate)
    config = replace(config, run=folder / run_name(candidate))
    cost = {"kb": planned.costs.kb["int8"], "ms": planned.costs.ms["int8"]}
    trial = train_candidate(candidate, config, cost, reporter)
    if trial.value is None:
        return trial
    return replace(trial, seconds=config.epochs * planned.epoch_seconds)
