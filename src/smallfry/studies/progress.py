"""Progress display of a race: one line per trial, and the remaining time."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from smallfry.io.console import CleanConsole
from smallfry.studies.contestants import CONTESTANTS
from smallfry.studies.trial import Job
from smallfry.training.progress import clock
from smallfry_runtime.background import BackgroundThread

SECONDS_A_LINE = 30.0  # outside of a terminal, where no bar moves
OVERHEAD = 1.3  # what evaluation and starting add to training


def study_bar(console: Console, things: str) -> Progress:
    """Create a live bar with the remaining time, in a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {things}, {{task.fields[left]}} left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Heartbeat:
    """Periodic progress line without a bar, so that a log shows activity.

    Args:
        console: Output console.
        text: Text of the line.
    """

    def __init__(self, console: Console, text: Callable[[], str]) -> None:
        self.console, self.text = console, text
        self._spoken, self._over = threading.Event(), threading.Event()
        self._thread = BackgroundThread(self._beat)

    def start(self) -> None:
        """Start, unless in a terminal."""
        if not self.console.is_terminal:
            self._thread.start()

    def say(self, text: str) -> None:
        """Print a line, and postpone the next periodic one."""
        self.console.print(text, markup=False, soft_wrap=True)
        self._spoken.set()

    def stop(self) -> None:
        """Stop the timer."""
        self._over.set()
        self._spoken.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.is_set():
            self._spoken.clear()
            if not self._spoken.wait(SECONDS_A_LINE) and not self._over.is_set():
                with suppress(OSError):  # whoever reads the log has gone
                    self.console.print(self.text(), markup=False, soft_wrap=True)


class Shown:
    """Base of progress displays: contexts with a bar and a heartbeat, which end with them."""

    bar: Progress
    heart: Heartbeat

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        self.heart.stop()
        self.bar.stop()


class RaceProgress(Shown):
    """Progress bar over trials, with the remaining time.

    Args:
        total: Trials to run.
        seconds: Total seconds of training.
        processes: Trials at a time.
    """

    def __init__(self, total: int, seconds: float, processes: int) -> None:
        self.total, self.seconds, self.processes = total, seconds, processes
        self.finished, self.spent = 0, 0.0
        self.began = time.monotonic()
        self.console = CleanConsole(highlight=False)
        self.bar = study_bar(self.console, "trials")
        self.heart = Heartbeat(self.console, self._standing)

    def __enter__(self) -> "RaceProgress":
        """Print the expected duration before the start."""
        if self.total:
            self.heart.say(
                f"{self.total} trials, {self.processes} at a time: about {clock(self._left())}"
            )
        else:
            self.heart.say("all trials are done; writing the report")
        self.task = self.bar.add_task("racing", total=self.total, left=clock(self._left()))
        self.bar.start()
        self.heart.start()
        return self

    def done(self, job: Job, measured: dict[str, Any]) -> None:
        """Count a finished trial."""
        self.finished += 1
        self.spent += job.seconds
        self.bar.update(self.task, advance=1, left=clock(self._left()))
        number = f"{self.finished:>{len(str(self.total))}}/{self.total}"
        self.heart.say(f"{number}  {_describe(job, measured)}; {clock(self._left())} left")

    def _left(self) -> float:
        """Estimate the remaining time, by plan at first, then by past durations."""
        if self.finished < self.processes:
            return (self.seconds - self.spent) * OVERHEAD / self.processes
        pace = (time.monotonic() - self.began) / max(self.spent, 1e-9)
        return pace * max(0.0, self.seconds - self.spent)

    def _standing(self) -> str:
        return f"{self.finished}/{self.total} trials; {clock(self._left())} left"


def _describe(job: Job, measured: dict[str, Any]) -> str:
    if job.phase == "fisher":
        return "errors of the Fisher approximations"
    settings = ", ".join(f"{name} {value:g}" for name, value in job.settings.items())
    told = f"{job.phase:8}  {CONTESTANTS[job.contestant].label} ({settings}), seed {job.seed}"
    if measured["diverged"]:
        return f"{told}: diverged"
    last = measured["points"][-1]
    return f"{told}: train {last['train']:.4f}, validation {last['validation']:.4f}"
