"""Learning-rate range test (Smith, arXiv 1506.01186)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.errors import RunError, UsageError, is_out_of_memory
from smallfry.training.config import TrainConfig
from smallfry.training.launch_env import launch
from smallfry.training.loop import Trainer
from smallfry.training.own_code import OwnCode
from smallfry.training.processes import leaving, start
from smallfry.training.progress import QuietReporter
from smallfry.training.train import build_new, with_full_paths

LOWEST, HIGHEST = 1e-6, 10.0  # learning rates
STEPS = 100
WIDTH = 3.0  # steps that the losses are smoothed over, as the deviation of a Gaussian
DIVERGED = 4.0  # times the lowest loss, at which the test ends
FALLEN = 0.8  # share of the fall of the loss at the suggestion
LEAST_FALL = 0.02  # of the loss, below which there is nothing to see


class RateTest(NamedTuple):
    """Losses at rising learning rates.

    Attributes:
        rates: Learning rate of each step.
        losses: Training loss of each step, before it.
        smooth: The same, smoothed.
        suggestion: Suggested rate; None if the loss does not fall.
        default: Rate of the configuration.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smooth: tuple[float, ...]
    suggestion: float | None
    default: float

    def describe(self) -> str:
        """Describe the suggestion in a line."""
        if self.suggestion is None:
            return (
                f"no suggestion: the loss does not fall at any rate up to {self.rates[-1]:.2g} "
                f"(the configured peak is {self.default:.2g})"
            )
        return (
            f"suggested learning rate: {self.suggestion:.2g} (--optimizer.lr "
            f"{self.suggestion:.2g}); the configured peak is {self.default:.2g}"
        )


def find_learning_rate(
    config: TrainConfig, file: str | Path, code: OwnCode | None = None, steps: int = STEPS
) -> RateTest:
    """Train at rising rates on the first batches of a run, and draw the losses.

    The model is built for the test and thrown away; a run after it is as without it.

    Args:
        config: Configuration of the run; its schedule and run folder play no role.
        file: The PNG to write, replacing another one; nothing else is written.
        code: Code that the configuration may name.
        steps: Number of rates, evenly spaced in their logarithm, unless the loss diverges.

    Raises:
        UsageError: A file of another kind, several processes, or an impossible setting.
        DataError: The data can't be used.
        RunError: The file can't be written.
    """
    from smallfry.report.rates import draw_rates  # here, as matplotlib is slow to import

    file = Path(file).expanduser()
    if file.suffix.lower() != ".png":
        raise UsageError(f"{file}: expected a name that ends in .png")
    if launch().processes > 1:
        raise UsageError("find_lr supports one process: start one")
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(), TemporaryDirectory() as place:
            plain = replace(with_full_paths(config), run=Path(place) / "run", callbacks=[])
            plain = replace(plain, loggers=[])
            processes = start(config.device, config.precision, config.strategy)
            with leaving(processes):
                trainer, _ = build_new(plain, QuietReporter(), processes, code or OwnCode())
                found = _test(trainer, steps)
    finally:
        torch.set_num_threads(threads)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_rates(found.rates, found.losses, found.smooth, found.suggestion, file)
    except OSError as error:
        raise RunError(f"{file}: can't be written ({error})") from error
    return found


def _test(trainer: Trainer, steps: int) -> RateTest:
    """Take steps at rising rates until the loss diverges."""
    rates, losses = np.geomspace(LOWEST, HIGHEST, steps), list[float]()
    for step, rate in enumerate(rates):
        trainer.progress.step = step
        try:
            loss = trainer.train_on(trainer.batches[step], float(rate)).loss.item()
        except (ArithmeticError, RuntimeError) as error:
            if not losses or is_out_of_memory(error):
                raise
            break  # such as a matrix of numbers that are not finite
        if not math.isfinite(loss) or loss > DIVERGED * min(losses, default=loss):
            break
        losses.append(loss)
    smooth = smoothed(losses)
    suggestion = suggest(rates[: len(losses)], smooth)
    used = tuple(map(float, rates[: len(losses)]))
    return RateTest(used, tuple(losses), tuple(smooth.tolist()), suggestion, trainer.peak_rate)


def smoothed(losses: Sequence[float]) -> NDArray[np.float64]:
    """Smooth losses with a Gaussian of ``WIDTH`` steps, cut off at both ends.

    Args:
        losses: Loss of each step.
    """
    steps = np.arange(len(losses))
    weights = np.exp(-(((steps[:, None] - steps) / WIDTH) ** 2) / 2)
    smooth: NDArray[np.float64] = weights @ np.asarray(losses, float) / weights.sum(1)
    return smooth


def suggest(rates: NDArray[np.float64], losses: NDArray[np.float64]) -> float | None:
    """Return the rate at which the loss has made four fifths of its fall, before its lowest.

    The rate of the steepest fall, which others take, depends on the noise of single batches more.

    Args:
        rates: Rising rates, (steps,).
        losses: Smoothed losses, (steps,).

    Returns:
        The rate; None if the loss falls by less than 2 %, or there are fewer than three rates.
    """
    if len(rates) < 3:
        return None
    lowest = int(losses.argmin())
    if losses[0] - losses[lowest] < LEAST_FALL * abs(losses[0]) or lowest == 0:
        return None
    level = losses[0] + FALLEN * (losses[lowest] - losses[0])
    above = np.flatnonzero(losses[:lowest] > level)
    return float(rates[above[-1] + 1])
