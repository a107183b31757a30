"""What a person sees of a study of training runs: which run, how far, and the time left."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any

from smallfry.report.runs import Outcome
from smallfry.studies.progress import study_bar
from smallfry.studies.recipes import Planned
from smallfry.terminal import CleanConsole
from smallfry.training.progress import QuietReporter, clock

SECONDS_A_LINE = 60.0  # outside of a terminal, where no bar moves


class GridProgress:
    """Runs that have ended, and the time left.

    Args:
        planned: All runs of the study.
        ended: Those that have ended already.
    """

    def __init__(self, planned: Sequence[Planned], ended: Mapping[str, Outcome]) -> None:
        self.total = len(planned)
        self.waiting = [plan for plan in planned if plan.name not in ended]
        self.pace: list[tuple[Mapping[str, Any], float]] = []  # facts, seconds an epoch
        for outcome in ended.values():
            self._learn(outcome)
        self.beside: list[float] = []  # seconds of a run that are not training
        self.said = self.began = time.monotonic()
        self.console = CleanConsole(highlight=False)
        self.bar = study_bar(self.console, "runs")

    def __enter__(self) -> "GridProgress":
        """Say how many runs there will be, before the first starts."""
        epochs = sum(plan.config.epochs for plan in self.waiting)
        done = self.total - len(self.waiting)
        text = f"{self.total} runs, {done} have ended; {epochs:,} epochs to go"
        self._say(text if self.waiting else f"all {self.total} runs have ended")
        self.task = self.bar.add_task("training", total=self.total, completed=done, left="?")
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        self.bar.stop()

    def begin(self, plan: Planned) -> "RunReporter":
        """A run starts; what it tells goes to the reporter that is returned."""
        self.waiting.remove(plan)
        self.began = time.monotonic()
        return RunReporter(self, plan)

    def during(self, plan: Planned, epoch: int, seconds: float, left: float) -> None:
        """A run has done so many epochs."""
        rate = seconds / max(1, epoch)
        text = f"{plan.name}, epoch {epoch}/{plan.config.epochs}"
        remaining = clock(left + self._left([*self.pace, (plan.facts, rate)]))
        self.bar.update(self.task, description=text, left=remaining)
        if not self.console.is_terminal and time.monotonic() - self.said > SECONDS_A_LINE:
            self._say(f"{text}; {remaining} left")

    def end(self, outcome: Outcome) -> None:
        """A run has ended."""
        self._learn(outcome)
        if outcome.minutes is not None:
            self.beside.append(max(0.0, time.monotonic() - self.began - 60 * outcome.minutes))
        number = self.total - len(self.waiting)
        left = clock(self._left(self.pace)) if self.pace else "an unknown time"
        result = f"test accuracy {outcome.test:.2f} %" if outcome.test is not None else "failed"
        if outcome.failure is not None:
            result = f"failed: {outcome.failure}"
        head = f"{number:>{len(str(self.total))}}/{self.total}  {outcome.name}"
        self._say(f"{head}: {result}; {left} left")
        self.bar.update(self.task, advance=1, left=left)

    def _left(self, pace: Sequence[tuple[Mapping[str, Any], float]]) -> float:
        """Seconds of the runs that wait, each at the pace of the one most like it."""
        if not pace:
            return 0.0

        def alike(facts: Mapping[str, Any], other: Mapping[str, Any]) -> int:
            return sum(facts.get(key) == value for key, value in other.items())

        beside = fmean(self.beside) * len(self.waiting) if self.beside else 0.0
        return beside + sum(
            plan.config.epochs * max(pace, key=lambda known: alike(plan.facts, known[0]))[1]
            for plan in self.waiting
        )

    def _learn(self, outcome: Outcome) -> None:
        if outcome.minutes is not None:
            self.pace.append((outcome.facts, 60 * outcome.minutes / outcome.measured("epochs")))

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        self.console.print(text, markup=False, soft_wrap=True)


class RunReporter(QuietReporter):
    """Tells the study's progress of the run that is trained now."""

    def __init__(self, progress: GridProgress, plan: Planned) -> None:
        self.progress, self.plan = progress, plan

    def epoch(self, row: Mapping[str, float], epochs: int, seconds_left: float) -> None:
        """Move the bar's text."""
        self.progress.during(self.plan, int(row["epoch"]), row["seconds"], seconds_left)
