"""Conclusion of a training: its test, pictures and summary."""

import math
import warnings
from typing import Any

import torch

from smallfry.costing import cost
from smallfry.data import ImageData
from smallfry.errors import RunError, SmallfryWarning, TrainingError
from smallfry.training.compression import CHOICE, DONE, LAST_EPOCH
from smallfry.training.config import TrainConfig
from smallfry.training.draw_run import draw_run
from smallfry.training.evaluation import predict, require_finite, score
from smallfry.training.evaluation_data import TEST_FINGERPRINT
from smallfry.training.evaluation_report import per_class_scores, write_tables
from smallfry.training.fine_tuning import START, kept_facts
from smallfry.training.loop import Trainer
from smallfry.training.own_task import facts
from smallfry.training.references import fit_references
from smallfry.training.run import load_run
from smallfry.training.thresholds import calibrate_best, with_thresholds

__all__ = ["PER_CLASS", "STOPPED_BY", "conclude"]

PER_CLASS, STOPPED_BY = "per_class", "stopped_by"  # entries of summaries


def conclude(trainer: Trainer, evidence: dict[str, object]) -> dict[str, Any]:
    """Test the best weights once, draw the plots, and write the summary.

    Args:
        trainer: That has trained.
        evidence: The code and machine as the training began.

    Raises:
        TrainingError: Outputs on the test images are not finite.
    """
    config, data, progress = trainer.config, trainer.data, trainer.progress
    folder, device = trainer.folder, trainer.fabric.device
    best = load_run(folder.path, "best")
    model = best.model.to(device)
    best = calibrate_best(folder, best, data, device)
    task = with_thresholds(trainer.objective.task, best)
    try:
        predictions = require_finite(predict(model, data.test, best.normalize, device))
        flipped = None
        if config.test_flips:
            flipped = predict(model, data.test, best.normalize, device, flips=True)
    except RunError as error:
        raise TrainingError(f"{folder.best}: on the test images, {error}") from None
    sample = torch.zeros(1, *data.input_shape, device=device)
    spent = cost(model, sample)
    cpu = progress.cpu_seconds
    summary = {
        "run": str(folder.path),
        "model": best.manifest["model"],
        **({DONE: best.manifest[DONE]} if DONE in best.manifest else {}),
        "task": config.task,
        "data": {
            **best.manifest["data"],
            TEST_FINGERPRINT: data.test_fingerprint,
            "classes": len(data.classes),
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
        "measured": {
            "test": score(predictions, task),
            **({} if flipped is None else {"test_flips": score(flipped, task)}),
            "best_epoch": len(progress.history) if trainer.plan.trains else progress.best_epoch,
            "select_on": config.select_on,
            **({} if config.select_by is None else {"select_by": config.select_by}),
            **({CHOICE: LAST_EPOCH} if trainer.plan.trains else {}),
            "epochs": len(progress.history),
            **({STOPPED_BY: progress.stopping} if progress.stopping else {}),
            "training_seconds": round(progress.seconds, 2),
            **({} if math.isnan(cpu) else {"cpu_seconds": round(cpu, 2)}),
            "seed": config.seed,
            "parameters": spent.parameters,
            "macs": spent.macs,
            "weight_bytes": spent.bytes,
            "activation_bytes": spent.activation_bytes,
            "references": _references(config, data),
        },
        **({PER_CLASS: scores} if (scores := per_class_scores(predictions, best)) else {}),
        **facts(config),
        "provenance": {**evidence, **kept_facts({START: best.manifest.get(START)})},
    }
    try:
        draw_run(folder, progress.history, best, data.test, predictions)
        if best.is_classifier:
            where = (folder.path, best, data, ("test", data.test), predictions)
            write_tables(*where, summary["provenance"], folder.pictures)
    except Exception as error:  # a picture must not cost the result
        warnings.warn(
            f"{folder.pictures}: not all pictures could be drawn ({error})",
            SmallfryWarning,
            stacklevel=2,
        )
    folder.write_summary(summary)
    trainer.callbacks.call("on_end", summary)
    return summary


def _references(config: TrainConfig, data: ImageData) -> list[dict[str, Any]]:
    """Fit reference classifiers, for classification only."""
    wanted = config.references and config.task == "classification"
    return fit_references(data) if wanted else []
