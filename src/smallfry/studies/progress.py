"""What a person sees of a study that runs for hours: a line for each trial, and the time left."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from smallfry.studies.contestants import CONTESTANTS
from smallfry.studies.trial import Job
from smallfry.terminal import CleanConsole
from smallfry.training.progress import clock

OVERHEAD = 1.3  # what evaluation and starting add to training


def study_bar(console: Console, things: str) -> Progress:
    """A live bar of the things done and the time left, in a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {things}, {{task.fields[left]}} left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class RaceProgress:
    """Trials done, and the time left.

    Args:
        total: Trials to run.
        seconds: Of training, of all of them together.
        processes: Trials at a time.
    """

    def __init__(self, total: int, seconds: float, processes: int) -> None:
        self.total, self.seconds, self.processes = total, seconds, processes
        self.finished, self.spent = 0, 0.0
        self.began = time.monotonic()
        self.console = CleanConsole(highlight=False)
        self.bar = study_bar(self.console, "trials")

    def __enter__(self) -> "RaceProgress":
        """Say how long it will take, before it starts."""
        if self.total:
            self._say(
                f"{self.total} trials, {self.processes} at a time: about {clock(self._left())}"
            )
        else:
            self._say("all trials are done; writing the report")
        self.task = self.bar.add_task("racing", total=self.total, left=clock(self._left()))
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

    def done(self, job: Job, measured: dict[str, Any]) -> None:
        """One more trial is done."""
        self.finished += 1
        self.spent += job.seconds
        self.bar.update(self.task, advance=1, left=clock(self._left()))
        number = f"{self.finished:>{len(str(self.total))}}/{self.total}"
        self._say(f"{number}  {_describe(job, measured)}; {clock(self._left())} left")

    def _left(self) -> float:
        """By plan at first, then by how long what is done has taken."""
        if self.finished < self.processes:
            return (self.seconds - self.spent) * OVERHEAD / self.processes
        pace = (time.monotonic() - self.began) / max(self.spent, 1e-9)
        return pace * max(0.0, self.seconds - self.spent)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def _describe(job: Job, measured: dict[str, Any]) -> str:
    if job.phase == "fisher":
        return "errors of the Fisher approximations"
    settings = ", ".join(f"{name} {value:g}" for name, value in job.settings.items())
    told = f"{job.phase:8}  {CONTESTANTS[job.contestant].label} ({settings}), seed {job.seed}"
    if measured["diverged"]:
        return f"{told}: diverged"
    last = measured["points"][-1]
    return f"{told}: train {last['train']:.4f}, validation {last['validation']:.4f}"
