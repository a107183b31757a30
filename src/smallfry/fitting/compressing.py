"""Compression and export of the best candidates, each export verified and logged once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smallfry.data import ImageData
from smallfry.deploy.export import export_precisions
from smallfry.deploy.pretrained import gather
from smallfry.deploy.targets import Target, find_target
from smallfry.errors import SmallfryError, Stopped, first_line
from smallfry.fitting.costs import without_details
from smallfry.fitting.plan import Planned
from smallfry.fitting.rungs import FitSpace, run_name
from smallfry.fitting.variants import Variant, find_variants, harder, tuned_epochs, tuning
from smallfry.fitting.verify import Verified, measure, verified
from smallfry.io.json import strict
from smallfry.io.json_lines import JsonLines
from smallfry.search import RUNG, Trial
from smallfry.search.evaluation import train_run
from smallfry.training.progress import Reporter
from smallfry_runtime.runtime import Runtime

FINALISTS = 2

Report = Callable[[str, int], Reporter]  # of a run's name and epochs


@dataclass(frozen=True)
class Finalist:
    """Trained candidate for compression."""

    run: str
    planned: Planned
    trial: Trial


def finalists(trials: Sequence[Trial], space: FitSpace) -> list[Finalist]:
    """Return the best candidates, and the best that fits without pruning if none of them does.

    Args:
        trials: All rungs; of a candidate the last one counts.
        space: The space.
    """
    last: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda t: int(t.candidate[RUNG])):
        if trial.value is not None:
            last[run_name(trial.candidate)] = trial
    ranked = sorted(last.items(), key=lambda item: -(item[1].value or 0.0))
    found = [Finalist(run, space.planned(t.candidate), t) for run, t in ranked]
    budget, best = space.config.budget, found[:FINALISTS]
    if not any(each.planned.fits(budget) for each in best):
        best += [each for each in found if each.planned.fits(budget)][:1]
    return best


class Exports:
    """Verified exports of a fit, logged as JSON lines.

    Args:
        folder: Folder of the fit.
        space: The space.
    """

    def __init__(self, folder: Path, space: FitSpace) -> None:
        self.folder, self.space = folder, space
        self.target: Target = find_target(space.config.target)
        self._lines = JsonLines(folder / "exports.jsonl", verified, "an export")

    def read(self) -> list[Verified]:
        """Read the verified exports.

        Raises:
            RunError: A line is none.
        """
        return [verified(record) for record in self._lines.read()]

    def make(self, best: Sequence[Finalist], report: Report) -> Iterator[Verified]:
        """Make and verify the missing exports, and yield all.

        Raises:
            Stopped: A signal came; the state is saved.
        """
        known = {each.name: each for each in self.read() if self._is_there(each)}
        planned = [(each, self._variants(each)) for each in best]
        tuned = sum(v.method is not None for _, variants in planned for v in variants)
        seconds = self.space.plan.tuning_seconds / max(1, tuned)
        for finalist, variants in planned:
            left = list(variants)
            while left:
                variant = left.pop(0)
                name = f"{finalist.run}-{variant.name}"
                found = known.get(name) or self._verified(name, finalist, variant, seconds, report)
                yield found
                more = self._more(variant, found)
                left += [] if more is None else [more]

    def _is_there(self, each: Verified) -> bool:
        """Return whether the folder of an export that was made is still there."""
        return each.export is None or (self.folder / each.export).is_dir()

    def _variants(self, finalist: Finalist) -> list[Variant]:
        costs, budget = finalist.planned.costs, self.space.config.budget
        return find_variants(costs, budget, self.target.precisions)

    def _more(self, variant: Variant, found: Verified) -> Variant | None:
        """Return a variant with fewer channels, where pruning came close to the budget."""
        if found.kb is None or found.ms is None or variant.kind != "hesso":
            return None
        excess = self.space.config.budget.excess(found.kb, found.ms)
        return harder(variant, excess) if excess > 1 else None

    def _verified(
        self, name: str, finalist: Finalist, variant: Variant, seconds: float, report: Report
    ) -> Verified:
        facts: dict[str, Any] = {
            "name": name,
            "run": finalist.run,
            "model": finalist.planned.name,
            "variant": variant.name,
            "precision": variant.precision,
            "methods": [] if variant.method is None else [variant.method],
        }
        try:
            folder = self._export(name, finalist, variant, seconds, report)
            found = measure(Runtime(folder, threads=1), self.space.data, self.space.config.budget)
            facts |= {**found, "export": str(folder.relative_to(self.folder))}
        except Stopped:
            raise
        except (SmallfryError, RuntimeError, MemoryError) as error:
            facts["failure"] = first_line(error)
        made = verified(strict(facts))
        self._lines.append(made.to_dict())
        return made

    def _export(
        self, name: str, finalist: Finalist, variant: Variant, seconds: float, report: Report
    ) -> Path:
        runs, source = self.folder / "runs", self.folder / "runs" / finalist.run
        if variant.method is not None:
            epochs = tuned_epochs(variant, finalist.planned.epoch_seconds, seconds)
            config = self.space.train(finalist.trial.candidate)
            config = tuning(config, source.resolve(), runs / name, variant, epochs)
            train_run(config, report(name, epochs))
            source = runs / name
        trained, facts, _ = gather(source, "best")
        place = self.folder / "exports" / name
        data: ImageData = self.space.data
        with without_details():
            export_precisions(trained, facts, {variant.precision: place}, data, self.target.name)
        return place
