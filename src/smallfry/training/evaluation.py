"""Predictions of a model on a split, and their scores."""

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.data import Split
from smallfry.errors import RunError, UsageError
from smallfry.models import Recursive
from smallfry.models.contract import map_tensors, replace_tensors, tensors
from smallfry.models.early_exit import recurse_until
from smallfry.tasks import Calibrated, Task, create_task
from smallfry.training.augment import Normalize
from smallfry.transforms.modes import evaluating
from smallfry_runtime.predictions import NOT_FINITE


class Predictions(NamedTuple):
    """Predictions of a model on a split."""

    logits: Any  # (images, outputs), float32, on the CPU; or a named tuple of such tensors
    labels: Tensor  # (images,), int64
    halting: Tensor | None  # (images,), probability of having finished; recursive models only
    steps: Tensor | None = None  # (images,), recursion steps taken; with early exit only


@torch.inference_mode()
def predict(
    model: nn.Module,
    split: Split,
    normalize: Normalize,
    device: torch.device | None = None,
    batch_size: int = 256,
    exit_threshold: float | None = None,
    flips: bool = False,
) -> Predictions:
    """Run a model over a split, in evaluation mode; its mode is restored.

    Args:
        model: The model.
        split: The images.
        normalize: Turns pixels into inputs.
        device: Where the model is; default the CPU.
        batch_size: Images at a time.
        exit_threshold: Images whose halting probability passes it leave the recursion.
        flips: Take the mean of the logits of each image and its mirror image.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    logits, halting, steps = [], [], []
    with evaluating(model):
        for rows in torch.split(split.rows, batch_size):
            images = normalize(split.pixels[rows]).to(device or torch.device("cpu"), dtype)
            step_logits, halt_logits, taken = forward(model, images, exit_threshold)
            if flips:
                mirrored = forward(model, images.flip(-1), exit_threshold)[0]
                step_logits = (step_logits.float() + mirrored.float()) / 2
            if taken is not None:
                steps.append(taken.cpu())
            logits.append(map_tensors(_on_cpu, step_logits))
            if halt_logits is not None:
                halting.append(halt_logits.float().sigmoid().cpu())
    return Predictions(
        _concatenated(logits),
        split.labels,
        torch.cat(halting) if halting else None,
        torch.cat(steps) if steps else None,
    )


def forward(
    model: nn.Module, images: Tensor, exit_threshold: float | None = None
) -> tuple[Any, Tensor | None, Tensor | None]:
    """Compute outputs, halting logits of a recursive model, and steps with early exit.

    Raises:
        UsageError: Early exit from a model that does not recur.
    """
    if not isinstance(model, Recursive):
        if exit_threshold is not None:
            raise UsageError(f"{type(model).__name__} is not recursive: leave early exit out")
        return model(images), None, None
    if exit_threshold is not None:
        return recurse_until(model, images, exit_threshold)
    step = model.recurse(images)[-1]
    return step.logits, step.halt_logits, None


@torch.inference_mode()
def score_steps(
    model: nn.Module, split: Split, normalize: Normalize, task: Task, batch_size: int = 256
) -> list[dict[str, float]]:
    """Score the predictions after each recursion step; arguments as ``predict``.

    Raises:
        UsageError: The model does not recur.
    """
    if not isinstance(model, Recursive):
        raise UsageError(f"{type(model).__name__} does not recur: it has no steps to score")
    model.eval()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batches = []
    for rows in torch.split(split.rows, batch_size):
        steps = model.recurse(normalize(split.pixels[rows]).to(dtype))
        batches.append([(step.logits.float(), step.halt_logits.float()) for step in steps])
    found = []
    for parts in zip(*batches, strict=True):
        logits, halting = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        found.append(score(Predictions(logits, split.labels, halting.sigmoid()), task))
    return found


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate the predictions on parts of a split."""
    halting = [part.halting for part in parts if part.halting is not None]
    steps = [part.steps for part in parts if part.steps is not None]
    return Predictions(
        _concatenated([part.logits for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat(halting) if halting else None,
        torch.cat(steps) if steps else None,
    )


def require_finite(predictions: Predictions) -> Predictions:
    """Require finite predictions and return them.

    Raises:
        RunError: A logit is not a number, so that no score means anything.
    """
    halting = [] if predictions.halting is None else [predictions.halting]
    if not all(bool(each.isfinite().all()) for each in (*tensors(predictions.logits), *halting)):
        raise RunError(NOT_FINITE)
    return predictions


def as_tensors(outputs: Any) -> Any:
    """Return arrays as tensors, those of a dictionary as the fields of a named tuple."""
    if not isinstance(outputs, Mapping):
        return torch.from_numpy(outputs)
    kind = namedtuple("Outputs", [*outputs])  # type: ignore[misc]
    return kind(*map(torch.from_numpy, outputs.values()))


def as_arrays(outputs: Any) -> Any:
    """Return tensors as arrays, the fields of a named tuple as a dictionary."""
    if isinstance(outputs, Tensor):
        return outputs.numpy()
    return {name: each.numpy() for name, each in outputs._asdict().items()}


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.float().cpu()


def _concatenated(parts: Sequence[Any]) -> Any:
    """Concatenate structures of tensors along their first dimension."""
    columns = zip(*map(tensors, parts), strict=True)
    return replace_tensors(parts[0], [torch.cat(column) for column in columns])


def task_of(manifest: Mapping[str, Any]) -> Task:
    """Return the task in a model's manifest; classification in manifests without one.

    Raises:
        UsageError: This version has no such task.
    """
    task = create_task(manifest.get("task", "classification"))
    return task.calibrated(manifest) if isinstance(task, Calibrated) else task


def targets_of(task: Task, outputs: Any, labels: Tensor) -> Any:
    """Return a task's targets of unmixed labels.

    Args:
        task: The task.
        outputs: Of a model for these images, whose second dimension is that of classes.
        labels: (images,), or (images, …) of tasks without classes.
    """
    first = tensors(outputs)[0]
    has_class = labels.ndim == 1 and not labels.is_floating_point()
    shares = F.one_hot(labels, first.shape[1]) if has_class else labels
    return task.targets(labels, shares.to(first.dtype))


def score(predictions: Predictions, task: Task | None = None) -> dict[str, float]:
    """Compute the scores of a task, by default classification, and means of halting and steps."""
    logits, labels, halting, steps = predictions
    scores = (task or task_of({})).metrics(logits, labels)
    if halting is not None:
        scores["halting"] = halting.mean().item()
    if steps is not None:
        scores["recursion_steps"] = steps.double().mean().item()
    return scores


def score_probabilities(
    probabilities: NDArray[Any], labels: Tensor, task: Task | None = None
) -> dict[str, float]:
    """Compute the scores of class probabilities (images, classes), one class per image or several.

    Args:
        probabilities: (images, classes).
        labels: (images,), or (images, classes) of 0 and 1.
        task: Its scores; default classification.
    """
    shares = torch.from_numpy(probabilities)
    if labels.ndim == 1:
        logits = shares.clamp(min=1e-30).log()
    else:
        logits = shares.double().logit(eps=1e-12).float()
    return score(Predictions(logits, labels, None), task)
