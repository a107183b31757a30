"""Progress display of a study of training runs: current run, step, and remaining time."""

import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from smallfry.io.console import CleanConsole
from smallfry.report.runs import Outcome
from smallfry.studies.progress import Heartbeat, Shown, study_bar
from smallfry.studies.recipes import Planned
from smallfry.training.progress import QuietReporter, clock


class GridProgress(Shown):
    """Progress bar over runs, with the remaining time.

    Args:
        planned: All runs of the study.
        ended: Those that have ended already.
        done: Epochs of those that were interrupted, by name.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        ended: Mapping[str, Outcome],
        done: Mapping[str, float] | None = None,
    ) -> None:
        self.total = len(planned)
        self.done = done or {}
        self.waiting = [plan for plan in planned if plan.name not in ended]
        self.pace: list[tuple[Mapping[str, Any], float]] = []  # facts, seconds an epoch
        for outcome in ended.values():
            self._learn(outcome)
        self.beside: list[float] = []  # seconds of a run that are not training
        self.began = time.monotonic()
        self.console = CleanConsole(highlight=False)
        self.bar = study_bar(self.console, "runs")
        self.standing = "loading"
        self.running: RunReporter | None = None
        self.heart = Heartbeat(self.console, self._standing)

    def __enter__(self) -> "GridProgress":
        """Print the number of runs before the first starts."""
        epochs = math.ceil(sum(map(self._epochs, self.waiting)))
        done = self.total - len(self.waiting)
        text = f"{self.total} runs, {done} have ended; {epochs:,} epochs to go"
        self.heart.say(text if self.waiting else f"all {self.total} runs have ended")
        self.task = self.bar.add_task("training", total=self.total, completed=done, left="?")
        self.bar.start()
        self.heart.start()
        return self

    def begin(self, plan: Planned) -> "RunReporter":
        """Start a run, and return its reporter."""
        self.waiting.remove(plan)
        self.began = time.monotonic()
        done = round(self.done.get(plan.name, 0))
        self.standing = f"{plan.name}, epoch {done}/{plan.config.epochs}"
        if not self.console.is_terminal:
            self.heart.say(self.standing)
        self.running = RunReporter(self, plan)
        return self.running

    def during(self, plan: Planned, epoch: int, seconds: float, left: float) -> None:
        """Update the epochs of a run."""
        rate = seconds / max(1, epoch)
        text = f"{plan.name}, epoch {epoch}/{plan.config.epochs}"
        remaining = clock(left + self._left([*self.pace, (plan.facts, rate)]))
        self.bar.update(self.task, description=text, left=remaining)
        self.standing = f"{text}; {remaining} left"

    def end(self, outcome: Outcome) -> None:
        """Finish a run."""
        self._learn(outcome)
        if outcome.minutes is not None:
            self.beside.append(max(0.0, time.monotonic() - self.began - 60 * outcome.minutes))
        number = self.total - len(self.waiting)
        left = clock(self._left(self.pace)) if self.pace else "an unknown time"
        result = f"test accuracy {outcome.test:.2f} %" if outcome.test is not None else "failed"
        if outcome.failure is not None:
            result = f"failed: {outcome.failure}"
        head = f"{number:>{len(str(self.total))}}/{self.total}  {outcome.name}"
        self.heart.say(f"{head}: {result}; {left} left")
        self.bar.update(self.task, advance=1, left=left)

    def _left(self, pace: Sequence[tuple[Mapping[str, Any], float]]) -> float:
        """Estimate the seconds of the waiting runs, each at the pace of the most similar one."""
        if not pace:
            return 0.0

        def alike(facts: Mapping[str, Any], other: Mapping[str, Any]) -> int:
            return sum(facts.get(key) == value for key, value in other.items())

        beside = fmean(self.beside) * len(self.waiting) if self.beside else 0.0
        return beside + sum(
            self._epochs(plan) * max(pace, key=lambda known: alike(plan.facts, known[0]))[1]
            for plan in self.waiting
        )

    def _standing(self) -> str:
        run = self.running
        return self.standing if run is None else f"{self.standing}; {run.steps}"

    def _epochs(self, plan: Planned) -> float:
        """Count the remaining epochs."""
        return plan.config.epochs - self.done.get(plan.name, 0.0)

    def _learn(self, outcome: Outcome) -> None:
        if outcome.minutes is not None:
            self.pace.append((outcome.facts, 60 * outcome.minutes / outcome.measured("epochs")))


class RunReporter(QuietReporter):
    """Reporter of the current run to the study's progress."""

    def __init__(self, progress: GridProgress, plan: Planned) -> None:
        self.progress, self.plan = progress, plan
        self._total = self._done = 0

    @property
    def steps(self) -> str:
        """Progress of the run in steps."""
        return f"step {self._done:,} of {self._total:,}" if self._total else "loading"

    def start(self, total: int, done: int) -> None:
        """Record the number of steps."""
        self._total, self._done = total, done

    def step(self, loss: float, images_per_second: float) -> None:
        """Count one step."""
        self._done += 1

    def epoch(self, row: Mapping[str, float], epochs: int, seconds_left: float) -> None:
        """Update the bar's text."""
        self.progress.during(self.plan, int(row["epoch"]), row["seconds"], seconds_left)
