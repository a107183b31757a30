"""Progress of a fit: the current training, the time left, and the best so far."""

import time
from collections.abc import Mapping

from smallfry.io.console import CleanConsole
from smallfry.studies.progress import Heartbeat, Shown, study_bar
from smallfry.training.progress import QuietReporter, clock


class FitProgress(Shown):
    """Lines on each trial, and a live bar in a terminal.

    Args:
        total: Trials and exports there will be about.
        seconds: Seconds of all training on idle cores.
        quiet: Print nothing.
    """

    def __init__(self, total: int, seconds: float, quiet: bool = False) -> None:
        self.total, self.seconds, self.done = total, seconds, 0
        self.best = "nothing yet"
        self.best_value: float | None = None
        self.now = "starting"
        self.spent = 0.0
        self.began = time.monotonic()
        self.console = CleanConsole(highlight=False, quiet=quiet)
        self.bar = study_bar(self.console, "steps")
        self.heart = Heartbeat(self.console, lambda: f"{self.now}; best so far: {self.best}")

    def __enter__(self) -> "FitProgress":
        """Show the bar."""
        self.task = self.bar.add_task("fitting", total=self.total, left=clock(self.seconds))
        self.bar.start()
        self.heart.start()
        return self

    def say(self, text: str) -> None:
        """Print a line."""
        self.heart.say(text)

    def run(self, name: str, epochs: int) -> "RunReporter":
        """Begin a run, and return its reporter."""
        return RunReporter(self, name, epochs)

    def epoch(self, name: str, epoch: int, epochs: int) -> None:
        """Update the current run."""
        self.now = f"{name}, epoch {epoch}/{epochs}"
        text = f"{self.now}; best {self.best}"
        self.bar.update(self.task, description=text, left=self._left())

    def end(
        self, text: str, name: str, value: float | None, seconds: float = 0.0, fresh: bool = True
    ) -> None:
        """Finish a trial or an export.

        Args:
            text: Its result.
            name: Its name, if it becomes the best.
            value: Its value, if it may.
            seconds: Planned seconds of its training.
            fresh: False for one that an earlier process has finished.
        """
        self.done += 1
        self.spent += seconds
        if value is not None and (self.best_value is None or value > self.best_value):
            self.best, self.best_value = f"{name} {value:.2f} %", value
        self.bar.update(self.task, advance=1, left=self._left())
        if fresh:
            head = f"{self.done}/{self.total}"
            self.heart.say(f"{head}  {text}; best so far {self.best}; {self._left()} left")

    def _left(self) -> str:
        """Estimate the remaining time, of idle cores at first and then at the past pace."""
        passed = time.monotonic() - self.began
        pace = passed / self.spent if self.spent > 0.2 * self.seconds else 1.0
        return clock(max(0.0, self.seconds - self.spent) * pace)


class RunReporter(QuietReporter):
    """Reporter of a run to the fit's progress."""

    def __init__(self, progress: FitProgress, name: str, epochs: int) -> None:
        self.progress, self.name = progress, name
        progress.epoch(name, 0, epochs)

    def epoch(self, row: Mapping[str, float], epochs: int, seconds_left: float) -> None:
        """Update the bar's text."""
        self.progress.epoch(self.name, int(row["epoch"]), epochs)
