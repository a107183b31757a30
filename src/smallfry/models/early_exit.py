"""Early exit: stop recursing once the halting probability passes a threshold."""

from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.models.contract import Recursive, map_tensors
from smallfry_runtime.early_exit import require_threshold

__all__ = ["Exit", "recurse_until"]


class Exit(NamedTuple):
    """Predictions and steps of each image at its exit."""

    logits: Tensor  # (batch, num_classes)
    halt_logits: Tensor  # (batch,)
    steps: Tensor  # (batch,), int64: recursion steps that were computed for it


@torch.no_grad()
def recurse_until(
    model: Recursive, images: Tensor, threshold: float, most: int | None = None
) -> Exit:
    """Recurse on each image until its halting probability passes a threshold.

    Images that have finished leave the batch, so that nothing more is computed for them.

    Args:
        model: In evaluation mode.
        images: (batch, channels, height, width), normalised.
        threshold: Halting probability; 0 gives all images one step, above 1 all steps.
        most: Recursion steps after which every image leaves; default ``recursion_steps``.

    Raises:
        UsageError: The threshold is negative or not a number.
    """
    require_threshold(threshold)
    most = model.recursion_steps if most is None else most
    x, left = model.embed(images), torch.arange(len(images), device=images.device)
    step = model.step(x, model.initial_state(len(images)))
    logits, halt_logits = step.logits.clone(), step.halt_logits.clone()
    steps = torch.ones_like(left)
    for number in range(2, most + 1):
        going = (halt_logits[left].sigmoid() < threshold).nonzero().squeeze(1)
        left = left[going]
        if len(left) == 0:
            break
        step = model.step(x[left], map_tensors(itemgetter(going), step.state))
        logits[left], halt_logits[left] = step.logits, step.halt_logits
        steps[left] = number
    return Exit(logits, halt_logits, steps)
