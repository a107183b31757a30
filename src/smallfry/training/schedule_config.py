"""Settings of the learning rate's schedule and of the average of weights."""

from dataclasses import dataclass, field
from typing import Literal

from smallfry.settings import check, check_values

__all__ = ["EMAConfig", "ScheduleConfig"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate schedule: linear warm-up, then decay until the end of training.

    Args:
        warmup_epochs: Epochs of warm-up; fractions are fine. Default a tenth of the run, at most 5.
        min_lr: Learning rate at the end.
        per: Change it each step, or each epoch as the paper does (its first runs at rate 0).
        shape: Of the fall: half a cosine; linear, which makes a triangle of it with the warm-up; or
            steps, a tenth after each of ``milestones``.
        milestones: Epochs after which the rate of steps falls, such as [80, 122].
    """

    warmup_epochs: float | None = None
    min_lr: float = 1e-6
    per: Literal["step", "epoch"] = "step"
    shape: Literal["cosine", "linear", "steps"] = "cosine"
    milestones: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_values(self, "schedule.")
        check((self.warmup_epochs or 0) >= 0, "schedule.warmup_epochs can't be negative")
        check(self.min_lr >= 0, "schedule.min_lr can't be negative")
        check(
            (self.shape == "steps") == bool(self.milestones),
            "schedule.shape steps and schedule.milestones go together",
        )
        check(min(self.milestones, default=1) > 0, "schedule.milestones must be positive")


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the weights, which is evaluated and saved.

    Args:
        decay: Share kept at each optimizer step; 0 turns the average off.
        warmup: Start with min(decay, (1 + t) / (10 + t)), so that a short run does not keep
            its random initialisation; the paper's decay is fixed.
    """

    decay: float = 0.999
    warmup: bool = True

    def __post_init__(self) -> None:
        check_values(self, "ema.")
        check(0 <= self.decay < 1, "ema.decay is 0 to below 1")
