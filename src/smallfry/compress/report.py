"""Comparison of a compressed model with its parent: size, accuracy and agreement."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.costing import cost
from smallfry.data import Split
from smallfry.tasks import Task
from smallfry.tasks.multilabel import MultiLabel
from smallfry.training.checkpoint import safetensors_bytes
from smallfry.training.evaluation import predict, score, task_of
from smallfry.training.run import TrainedModel


class Comparison(NamedTuple):
    """Figures of the parent and of the compressed model, in this order."""

    parameters: tuple[int, int]
    macs: tuple[int, int]  # of all calls for one image
    file_bytes: tuple[int, int]  # of the weights as safetensors, or packed
    accuracy: tuple[float, float] | None  # on the images compared on
    agreement: float | None  # share of images with the parent's class, or classes
    divergence: float | None  # mean KL(parent ‖ compressed) of the class probabilities, nats
    images: int


def compare(parent: TrainedModel, small: TrainedModel, split: Split | None) -> Comparison:
    """Compare a compressed model with its parent.

    Args:
        parent: The model before.
        small: The model after.
        split: Labelled images, such as the validation split; None for sizes alone. Agreement and
            divergence are of classes alone.
    """
    sample = torch.zeros(1, *parent.input_shape)
    costs = [cost(each.model, sample) for each in (parent, small)]
    sizes = [_file_bytes(each) for each in (parent, small)]
    accuracy = agreement = divergence = None
    if split is not None and len(split):
        said = [predict(each.model, split, each.normalize) for each in (parent, small)]
        task = task_of(parent.manifest)
        if parent.is_classifier:
            before, after = (each.logits.double() for each in said)
            agreement, divergence = _differences(before, after, task)
        scores = [score(each, task)["accuracy"] for each in said]
        accuracy = (scores[0], scores[1])
    return Comparison(
        (costs[0].parameters, costs[1].parameters),
        (costs[0].macs, costs[1].macs),
        (sizes[0], sizes[1]),
        *(accuracy, agreement, divergence),
        0 if split is None else len(split),
    )


def _differences(before: Tensor, after: Tensor, task: Task) -> tuple[float, float]:
    """Return the share of equal classes, and the mean KL divergence of their probabilities."""
    if isinstance(task, MultiLabel):
        chosen = [task.chosen(each) for each in (before, after)]
        same = (chosen[0] == chosen[1]).all(dim=1)
        logs = [_log_bernoulli(each) for each in (before, after)]
    else:
        same = before.argmax(1) == after.argmax(1)
        logs = [each.log_softmax(dim=1) for each in (before, after)]
    nats = (logs[0].exp() * (logs[0] - logs[1])).flatten(1).sum(1)
    return float(same.double().mean()), float(nats.mean().clamp(min=0))


def _log_bernoulli(logits: Tensor) -> Tensor:
    """Return the logarithms of having each class and of not having it, (images, classes, 2)."""
    return F.logsigmoid(torch.stack([logits, -logits], dim=-1))


def rows(found: Comparison) -> list[tuple[str, str, str, str]]:
    """Format a comparison as table rows: figure, before, after, ratio."""
    lines = [
        _line("parameters", found.parameters, "{:,.0f}"),
        _line("multiply-accumulates", found.macs, "{:,.0f}"),
        _line("weights, bytes", found.file_bytes, "{:,.0f}"),
    ]
    if found.accuracy is not None:
        before, after = found.accuracy
        points = f"{100 * (after - before):+.2f} points"
        lines.append(("validation accuracy", f"{before:.2%}", f"{after:.2%}", points))
        if found.agreement is None:
            return lines
        lines.append(("same answer as before", "", f"{found.agreement:.2%}", ""))
        lines.append(("KL from before, nats", "", f"{found.divergence:.2g}", ""))
    return lines


def to_dict(found: Comparison, methods: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Convert a comparison to a dictionary for JSON."""
    names = ("parameters", "macs", "file_bytes", "accuracy")
    pairs = {name: getattr(found, name) for name in names}
    figures: dict[str, Any] = {
        name: None if pair is None else {"before": pair[0], "after": pair[1]}
        for name, pair in pairs.items()
    }
    divergence = found.divergence
    finite = divergence is not None and math.isfinite(divergence)
    return {
        "methods": methods,
        **figures,
        "agreement": found.agreement,
        "divergence": divergence if finite else None,
        "validation_images": found.images,
    }


def _line(name: str, pair: tuple[int, int], form: str) -> tuple[str, str, str, str]:
    before, after = (form.format(each) for each in pair)
    return name, before, after, f"× {pair[1] / pair[0]:.3f}" if pair[0] else ""


def _file_bytes(trained: TrainedModel) -> int:
    plain = safetensors_bytes(trained.model.state_dict())
    return len(plain if trained.packing is None else trained.packing(plain))
