"""Progress display of training: a live bar, plain lines, or nothing."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal, Protocol

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from smallfry.io.console import CleanConsole
from smallfry.io.terminal import say

Mode = Literal["auto", "rich", "plain", "quiet"]


class Reporter(Protocol):
    """Receiver of training progress."""

    def start(self, total: int, done: int) -> None:
        """Start at step ``done`` of ``total``."""

    def step(self, loss: float, images_per_second: float) -> None:
        """Count a step."""

    def epoch(self, row: Mapping[str, float], epochs: int, seconds_left: float) -> None:
        """Report an epoch; ``row`` is its row of ``metrics.csv``."""

    def say(self, message: str) -> None:
        """Print a message."""

    def close(self) -> None:
        """Close the display after training, whatever the outcome."""


class QuietReporter:
    """Reporter without output."""

    def start(self, total: int, done: int) -> None:
        """Do nothing."""

    def step(self, loss: float, images_per_second: float) -> None:
        """Do nothing."""

    def epoch(self, row: Mapping[str, float], epochs: int, seconds_left: float) -> None:
        """Do nothing."""

    def say(self, message: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class PlainReporter(QuietReporter):
    """Line per epoch, for logs."""

    def epoch(self, row: Mapping[str, float], epochs: int, seconds_left: float) -> None:
        """Print one line."""
        self.say(f"{describe(row, epochs)}  {clock(seconds_left)} left")

    def say(self, message: str) -> None:
        """Print one line."""
        say(message)


class RichReporter(QuietReporter):
    """Live bar in a terminal, with a line for every tenth of the epochs."""

    def __init__(self) -> None:
        self.console = CleanConsole(highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=True,
        )
        self.accuracy = ""

    def start(self, total: int, done: int) -> None:
        """Show the bar."""
        self.task = self.progress.add_task("training", total=total, completed=done, status="")
        self.progress.start()

    def step(self, loss: float, images_per_second: float) -> None:
        """Advance the bar."""
        status = f"loss {loss:.3f}{self.accuracy}  {images_per_second:,.0f} images/s"
        self.progress.update(self.task, advance=1, status=status)

    def epoch(self, row: Mapping[str, float], epochs: int, seconds_left: float) -> None:
        """Print an occasional permanent line."""
        number = int(row["epoch"])
        selected = [key for key in row if key.endswith("_accuracy") and key != "train_accuracy"]
        self.accuracy = f"  accuracy {row[selected[0]]:.2%}" if selected else ""
        if number % max(1, epochs // 10) == 0 or number == epochs:
            self.say(describe(row, epochs))

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, markup=False)

    def close(self) -> None:
        """Remove the bar."""
        self.progress.stop()


def build_reporter(mode: Mode) -> Reporter:
    """Build the reporter of a mode; auto is quiet under CI, rich in a terminal, else plain.

    A notebook shows a bar through ipywidgets only; without it, rich is plain.
    """
    if mode == "auto":
        seen: Mode = "rich" if CleanConsole().is_terminal else "plain"
        mode = "quiet" if os.environ.get("CI") else seen
    if mode == "rich" and CleanConsole().is_jupyter and find_spec("ipywidgets") is None:
        mode = "plain"
    return {"rich": RichReporter, "plain": PlainReporter, "quiet": QuietReporter}[mode]()


def describe(row: Mapping[str, float], epochs: int) -> str:
    """Format a row of ``metrics.csv`` as a line."""
    parts = [f"epoch {int(row['epoch']):>{len(str(epochs))}}/{epochs}"]
    parts.append(f"loss {row['train_loss']:.3f}")
    for split in ("validation", "test"):
        if f"{split}_accuracy" in row:
            parts.append(f"{split} accuracy {row[f'{split}_accuracy']:.2%}")
    parts.append(f"{row['images_per_second']:,.0f} images/s")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Format seconds as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
