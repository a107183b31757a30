"""Runs of tasks that fit their models themselves, without gradients, steps or epochs.

The run folder has a model, its scores and pictures as any other, but nothing to be resumed.
"""

import time
from typing import Any

import torch

from smallfry.costing import cost
from smallfry.data import ImageData
from smallfry.errors import DataError, UsageError
from smallfry.tasks import FitsItself, Pictured, Task, create_task, find_task
from smallfry.tasks.task import Explained, Fitted
from smallfry.training.checkpoint import save_checkpoint
from smallfry.training.config import TrainConfig
from smallfry.training.evaluation import Predictions, predict, require_finite, score
from smallfry.training.evaluation_data import load_config_data
from smallfry.training.first_manifest import describe_model
from smallfry.training.model_source import ModelSource, model_name
from smallfry.training.progress import Reporter, build_reporter
from smallfry.training.provenance import provenance
from smallfry.training.run import RunFolder, TrainedModel, load_run, new_run_folder

__all__ = ["fit_once", "fits_itself"]

# settings of gradients and steps
UNUSED = (
    *("optimizer", "methods", "distillation", "adversarial", "augment", "balance", "schedule"),
    *("ema", "batch_size", "accumulate", "precision", "channels_last", "compile"),
)


def fits_itself(config: TrainConfig) -> bool:
    """Return whether a configuration's task fits its models itself."""
    return issubclass(find_task(config.task), FitsItself)


def fit_once(config: TrainConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Fit a model, test it, and write its run folder; see ``train``.

    Raises:
        UsageError: An optimizer or methods, which need gradients, or what the task refuses.
        DataError: The data can't be used.
        RunError: The run folder is taken or can't be written.
    """
    task = create_task(config.task, config.objective.label_smoothing)
    assert isinstance(task, FitsItself)
    for name in UNUSED:
        if getattr(config, name) != getattr(TrainConfig(), name):
            raise UsageError(f"{config.task} is fitted without gradients: leave out {name}")
    if config.epochs not in (1, TrainConfig().epochs):
        raise UsageError(f"{config.task} is fitted at once: leave out epochs")
    if config.run is not None:
        RunFolder(config.run).require_free()
    data = load_config_data(config.data)
    if len(data.train) < 2 or data.test_count == 0:
        raise DataError(f"{data.origin}: needs two training images and one to test at least")
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads or 1)
    model, spec = ModelSource().make(config.model, data, task)
    path = config.run or new_run_folder(config.data.name, model_name(config.model, data, task))
    folder = RunFolder(path)
    reporter = reporter or build_reporter(config.progress)
    with folder.locked():
        folder.begin(config.to_dict())
        reporter.say(f"fitting {spec.architecture} on {data.name} into {path}")
        evidence, started = provenance(torch.device("cpu")), time.monotonic()
        fitted = task.fit(model, data)
        seconds = time.monotonic() - started
        for note in fitted.notes:
            reporter.say(note)
        moments = (0.0,) * data.channels, (1.0,) * data.channels
        manifest = describe_model(config, spec, data, moments, {})
        save_checkpoint(folder.best, manifest, model.state_dict())
        trained = load_run(path)
        predictions = require_finite(predict(trained.model, data.test, trained.normalize))
        summary = _summary(config, trained, data, fitted, score(predictions, task), seconds)
        folder.write_summary({**summary, "run": str(path), "provenance": evidence})
        _draw(folder, trained, data, task, predictions)
    return {**summary, "run": str(path), "provenance": evidence}


def _summary(
    config: TrainConfig,
    trained: TrainedModel,
    data: ImageData,
    fitted: Fitted,
    scores: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    spent = cost(trained.model, torch.zeros(1, *data.input_shape))
    counts = {"train": len(data.train), "validation": len(data.validation), "test": data.test_count}
    return {
        "model": trained.manifest["model"],
        "task": config.task,
        "data": {**trained.manifest["data"], "classes": len(data.classes), **counts},
        "measured": {
            "test": scores,
            "best_epoch": 1,
            "select_on": "validation",
            "epochs": 1,
            "training_seconds": round(seconds, 2),
            "seed": config.seed,
            "parameters": spent.parameters,
            "macs": spent.macs,
            "weight_bytes": spent.bytes,
            "activation_bytes": spent.activation_bytes,
            "references": [dict(each) for each in fitted.references],
            **fitted.facts,
        },
    }


def _draw(
    folder: RunFolder,
    trained: TrainedModel,
    data: ImageData,
    task: Task,
    predictions: Predictions,
) -> None:
    folder.pictures.mkdir(exist_ok=True)
    if isinstance(task, Pictured):
        task.draw(predictions.logits, data.test, trained.classes, folder.pictures)
    if isinstance(task, Explained):
        task.explain(trained.model, data.test, trained.normalize, trained.classes, folder.pictures)
