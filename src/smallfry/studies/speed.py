"""CPU seconds of an epoch of training, measured on some steps of the training loop itself."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from smallfry.training.config import TrainConfig
from smallfry.training.progress import QuietReporter
from smallfry.training.train import train

WARM_UP = 2  # steps that are not counted
FEWEST = 3  # counted steps
EVALUATION = 1 / 3  # of the time of a step on as many images


class Measured(Exception):
    """End of a measurement."""


class SpeedReporter(QuietReporter):
    """Reporter of step times, with an end of the training after enough steps.

    Args:
        seconds: Time to count steps for.
        on_cpu: Count CPU seconds of all threads, which other processes hardly change; otherwise
            those on the clock.
    """

    def __init__(self, seconds: float, on_cpu: bool) -> None:
        self.seconds = seconds
        self.clock = time.process_time if on_cpu else time.perf_counter
        self.total = self.done = 0
        self.began = self.spent = 0.0

    def start(self, total: int, done: int) -> None:
        """Record the number of steps in all epochs."""
        self.total = total

    def step(self, loss: float, images_per_second: float) -> None:
        """Count a step.

        Raises:
            Measured: These were enough.
        """
        self.done += 1
        if self.done <= WARM_UP:
            self.began = self.clock()
            return
        self.spent = self.clock() - self.began
        if self.done >= WARM_UP + FEWEST and self.spent >= self.seconds:
            raise Measured


def measure_epoch(config: TrainConfig, seconds: float) -> dict[str, float]:
    """Measure the seconds of an epoch, with augmentation and the evaluation after it.

    Args:
        config: The run's; its epochs, schedule and folder play no role.
        seconds: Time to measure for, besides two steps before.

    Returns:
        ``epoch_seconds``, those of all CPU threads on a CPU; ``step_seconds``, ``steps`` counted
        and ``steps_per_epoch``.

    Raises:
        SmallfryError: The run can't be started; as ``train``.
    """
    on_cpu = _is_on_cpu(config.device)
    reporter = SpeedReporter(seconds, on_cpu)
    epochs = 100_000  # more than are taken
    config = replace(config, epochs=epochs, schedule=replace(config.schedule, warmup_epochs=1.0))
    with TemporaryDirectory() as place, suppress(Measured):
        train(replace(config, run=Path(place) / "run"), reporter)
    counted = reporter.done - WARM_UP
    steps = reporter.total // epochs
    step = reporter.spent / counted
    held_out = config.data.validation / (1 - config.data.validation)
    return {
        "epoch_seconds": steps * step * (1 + EVALUATION * held_out),
        "step_seconds": step,
        "steps": counted,
        "steps_per_epoch": steps,
    }


def epochs_within(seconds: float, speed: Mapping[str, float]) -> int:
    """Return the number of epochs closest to a time, at least one."""
    return max(1, math.floor(seconds / speed["epoch_seconds"] + 0.5))


def cores_of(device: str, threads: int) -> int:
    """Return the cores whose seconds count: the threads on a CPU, else one."""
    return threads if _is_on_cpu(device) else 1


def _is_on_cpu(device: str) -> bool:
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) is None
    return torch.device(device).type == "cpu"
