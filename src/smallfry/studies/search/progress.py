"""Progress of a search: a line for each trial with the best so far, and a bar in a terminal."""

import time

from smallfry.io.console import CleanConsole
from smallfry.search.space import Trial
from smallfry.studies.progress import Heartbeat, Shown, study_bar
from smallfry.training.progress import clock

__all__ = ["SearchProgress"]


class SearchProgress(Shown):
    """Lines on trials.

    Args:
        total: Trials there will be.
        quiet: Print nothing.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total, self.done, self.fresh = total, 0, 0
        self.best: float | None = None
        self.began = time.monotonic()
        console = CleanConsole(highlight=False, quiet=quiet)
        self.bar = study_bar(console, "trials")
        self.heart = Heartbeat(console, self._state)

    def __enter__(self) -> "SearchProgress":
        """Show the bar."""
        self.task = self.bar.add_task("searching", total=self.total, left="?")
        self.bar.start()
        self.heart.start()
        return self

    def end(self, trial: Trial, fresh: bool = True) -> None:
        """Count a trial; one of an earlier process prints no line."""
        self.done, self.fresh = self.done + 1, self.fresh + fresh
        if trial.value is not None:
            self.best = trial.value if self.best is None else max(self.best, trial.value)
        left = self._left()
        self.bar.update(self.task, advance=1, left=left, description=self._state())
        if fresh:
            result = f"failed: {trial.failure}" if trial.value is None else f"{trial.value:.2f} %"
            self.heart.say(f"{self._state()}; this one {result}; {left} left")

    def _left(self) -> str:
        if not self.fresh:
            return "?"
        seconds = (time.monotonic() - self.began) / self.fresh
        return clock(max(0.0, seconds * (self.total - self.done)))

    def _state(self) -> str:
        best = "none" if self.best is None else f"{self.best:.2f} %"
        return f"{self.done}/{self.total}, best so far {best}"
