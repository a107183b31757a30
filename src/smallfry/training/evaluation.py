"""What a model says of a split, and how right that is."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from smallfry.data import Split
from smallfry.training.augment import Normalize


class Predictions(NamedTuple):
    """What a model says of a split."""

    logits: Tensor  # (images, classes), float32, on the CPU
    labels: Tensor  # (images,), int64
    halting: Tensor | None  # (images,), probability of having finished; recursive models only


@torch.inference_mode()
def predict(
    model: nn.Module,
    split: Split,
    normalize: Normalize,
    device: torch.device | None = None,
    batch_size: int = 256,
) -> Predictions:
    """Run a model over a split, in evaluation mode; its mode is restored."""
    was_training = model.training
    model.eval()
    dtype = next(model.parameters()).dtype
    logits, halting = [], []
    for rows in torch.split(split.rows, batch_size):
        images = normalize(split.pixels[rows]).to(device or torch.device("cpu"), dtype)
        step_logits, halt_logits = forward(model, images)
        logits.append(step_logits.float().cpu())
        if halt_logits is not None:
            halting.append(halt_logits.float().sigmoid().cpu())
    model.train(was_training)
    return Predictions(torch.cat(logits), split.labels, torch.cat(halting) if halting else None)


def forward(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Class logits, and halting logits where the model has them."""
    if hasattr(model, "recurse"):
        recursive: Any = model
        step = recursive.recurse(images)[-1]
        return step.logits, step.halt_logits
    return model(images), None


def score(predictions: Predictions) -> dict[str, float]:
    """Loss, accuracy, macro F1, calibration error and, for recursive models, mean halting."""
    logits, labels, halting = predictions
    classes = logits.shape[1]
    probabilities = logits.softmax(dim=1)
    scores = {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": multiclass_accuracy(logits, labels, classes, average="micro").item(),
        "macro_f1": multiclass_f1_score(logits, labels, classes, average="macro").item(),
        "calibration_error": multiclass_calibration_error(probabilities, labels, classes).item(),
    }
    if halting is not None:
        scores["halting"] = halting.mean().item()
    return scores
