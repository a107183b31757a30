"""Where an image may leave the recursion: thresholds calibrated on validation images.

The halting probability says how sure a model is, on a scale of its own. What a threshold costs in
accuracy and saves in steps is measured on images that were not trained on, for every threshold
that makes a difference, and the threshold is chosen there.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.models import ViTRM
from smallfry.training.augment import Normalize

NEVER = 1.01  # a threshold that no probability passes
THRESHOLDS = 200  # looked at, at equal shares of all halting probabilities


class Trace(NamedTuple):
    """What a model would say of each image after each recursion step."""

    right: Tensor  # (steps, images), bool
    halting: Tensor  # (steps, images), probability of being right, by the model itself


class Point(NamedTuple):
    """What a threshold gives."""

    threshold: float
    accuracy: float
    steps: float  # recursion steps an image, on average


@torch.inference_mode()
def trace(model: nn.Module, split: Split, normalize: Normalize, batch_size: int = 256) -> Trace:
    """Follow every image of a split through all recursion steps of a model, on its device.

    Raises:
        UsageError: A model that takes one step, or none.
    """
    if not isinstance(model, ViTRM) or model.recursion_steps < 2:
        raise UsageError(
            "early exit needs a model with several recursion steps; train one with "
            "--objective.supervision_steps 4 --model.recursion_steps 4"
        )
    if len(split) == 0:
        raise UsageError("early exit needs validation images to calibrate its threshold on")
    device: Any = model.y_init.device
    right, halting = [], []
    for rows, labels in zip(
        torch.split(split.rows, batch_size), torch.split(split.labels, batch_size), strict=True
    ):
        steps = model.eval().recurse(normalize(split.pixels[rows]).to(device, model.y_init.dtype))
        right.append(torch.stack([s.logits.argmax(1).cpu() == labels for s in steps]))
        halting.append(torch.stack([s.halt_logits.float().sigmoid().cpu() for s in steps]))
    return Trace(torch.cat(right, dim=1), torch.cat(halting, dim=1))


def operating_points(traced: Trace) -> list[Point]:
    """What each threshold gives, from the most thrifty to the one that nobody passes."""
    quantiles = torch.linspace(0, 1, THRESHOLDS, dtype=torch.float64)
    candidates = traced.halting[:-1].double().flatten().quantile(quantiles).tolist()
    return [_point(traced, threshold) for threshold in sorted({0.0, *candidates, NEVER})]


def most_thrifty(points: list[Point], drop: float) -> Point:
    """The fewest steps whose accuracy is within ``drop`` of that of all steps."""
    enough = points[-1].accuracy - drop
    return min((p for p in points if p.accuracy >= enough - 1e-9), key=lambda p: p.steps)


def most_accurate(points: list[Point], steps: float) -> Point:
    """The best accuracy for at most so many steps on average.

    Raises:
        UsageError: Fewer than one step.
    """
    cheap = [p for p in points if p.steps <= steps + 1e-9]
    if not cheap:
        raise UsageError(f"an image takes one recursion step at least, not {steps}")
    return max(cheap, key=lambda p: (p.accuracy, -p.steps))


def _point(traced: Trace, threshold: float) -> Point:
    leaves = traced.halting >= threshold
    leaves[-1] = True
    last = leaves.int().argmax(dim=0)  # the first step that passes
    right = traced.right.gather(0, last[None])[0]
    return Point(threshold, right.double().mean().item(), last.double().mean().item() + 1)
