"""Thresholds of a task's answers, calibrated on the validation images of a finished run."""

import warnings
from typing import Any

import torch

from smallfry.data import ImageData
from smallfry.errors import SmallfryWarning
from smallfry.tasks import Calibrated, Task
from smallfry.training.checkpoint import save_checkpoint
from smallfry.training.evaluation import predict, task_of
from smallfry.training.run import RunFolder, TrainedModel

__all__ = ["calibrate_best", "with_thresholds"]


def calibrate_best(
    folder: RunFolder, best: TrainedModel, data: ImageData, device: torch.device
) -> TrainedModel:
    """Write the thresholds of a task that has some into the best checkpoint.

    Without validation images they stay as they are, with a warning.

    Args:
        folder: The run.
        best: Its best model.
        data: Its data.
        device: Where the model is.
    """
    task = task_of(best.manifest)
    if not isinstance(task, Calibrated):
        return best
    if len(data.validation) == 0:
        warnings.warn(
            "thresholds were not calibrated, for lack of validation images, and are 0.5: hold some "
            "out with --data.validation 0.1",
            SmallfryWarning,
            stacklevel=2,
        )
        return best
    found = predict(best.model, data.validation, best.normalize, device)
    manifest = best.manifest | task.calibrate(found.logits, found.labels)
    kept: dict[str, Any] = {k: v for k, v in manifest.items() if k not in ("format", "smallfry")}
    save_checkpoint(folder.best, kept, best.model.state_dict())
    return best._replace(manifest=manifest)


def with_thresholds(task: Task, trained: TrainedModel) -> Task:
    """Return a task with the thresholds of a model, where it has any."""
    return task.calibrated(trained.manifest) if isinstance(task, Calibrated) else task
