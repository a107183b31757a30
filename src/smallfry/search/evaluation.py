"""Evaluation of candidates by training; only validation images count."""

import gc
import math
from collections.abc import Mapping

import torch

from smallfry.errors import Stopped, TrainingError, UsageError, first_line
from smallfry.search.space import Candidate, Trial
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import TrainConfig
from smallfry.training.progress import Reporter
from smallfry.training.run import RunFolder
from smallfry.training.train import resume, train

__all__ = ["train_candidate", "train_run", "value_of"]

LOSS_WEIGHT = 1e-3  # of the loss beside the accuracy in percent: it decides between equals


def train_candidate(
    candidate: Candidate,
    config: TrainConfig,
    cost: Mapping[str, float],
    reporter: Reporter | None = None,
) -> Trial:
    """Train a candidate, from where it was stopped.

    Args:
        candidate: The candidate.
        config: Its training, with a run folder.
        cost: Its cost, for the trial.
        reporter: Receiver of progress.

    Returns:
        A trial, whose value is the validation accuracy in percent, less a little of the loss; one
        without a value if the training failed.

    Raises:
        Stopped: A signal came; the state is saved.
    """
    assert config.run is not None
    try:
        train_run(config, reporter)
        scores = load_checkpoint(RunFolder(config.run).best).manifest["training"]["scores"]
    except (Stopped, torch.AcceleratorError):  # which is lost to this process
        raise
    except (TrainingError, UsageError, MemoryError, RuntimeError) as error:
        reason = first_line(error)
        return Trial(candidate, None, config.seed, failure=reason)
    finally:
        gc.collect()
    if not math.isfinite(scores["loss"]):
        reason = f"its validation loss is {scores['loss']}"
        return Trial(candidate, None, config.seed, failure=reason)
    return Trial(
        candidate,
        value_of(scores["accuracy"], scores["loss"]),
        config.seed,
        cost,
        measured={
            "accuracy": scores["accuracy"],
            "loss": scores["loss"],
            "epochs": config.epochs,
        },
    )


def train_run(config: TrainConfig, reporter: Reporter | None = None) -> None:
    """Train a run to the configuration's epochs, from wherever it is.

    Raises:
        Stopped: A signal came; the state is saved.
        SmallfryError: As ``train``.
    """
    assert config.run is not None
    if RunFolder(config.run).config.exists():
        resume(config.run, reporter, {"epochs": config.epochs})
    else:
        train(config, reporter)


def value_of(accuracy: float, loss: float) -> float:
    """Return the value of a model: accuracy in percent, and of equals the lower loss."""
    return 100 * accuracy - LOSS_WEIGHT * min(loss, 10.0)
