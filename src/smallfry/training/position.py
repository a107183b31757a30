"""Position of a training run."""

import math
from dataclasses import dataclass, field

from smallfry.errors import TrainingError


@dataclass
class Progress:
    """Position of a run: all state of the loop besides weights and optimizer."""

    step: int = 0  # batches done
    updates: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent training
    cpu_seconds: float = 0.0  # of all threads of this process meanwhile; nan if not known
    history: list[dict[str, float]] = field(default_factory=list)  # rows of metrics.csv
    best_epoch: int = 0
    best_score: tuple[float, ...] = (-math.inf,)  # the task's rank of its scores
    sums: dict[str, float] = field(default_factory=dict)  # over the epoch in progress
    stopping: str = ""  # the callback that ends the training with this epoch


def divergence(what: str, step: int, epoch: int, has_checkpoint: bool) -> TrainingError:
    """Build the error of a run with a number that is not finite.

    Args:
        what: Beginning of the sentence, up to "a finite number".
        step: Step of the number.
        epoch: Its epoch, from 1.
        has_checkpoint: A checkpoint is left.
    """
    kept = "the last good checkpoint is kept" if has_checkpoint else "none was saved"
    return TrainingError(
        f"step {step} (epoch {epoch}): {what} a finite number; training stopped, {kept}. "
        "Try a lower optimizer.lr, optimizer.clip 1, a longer schedule.warmup_epochs, or "
        "precision 32-true"
    )
