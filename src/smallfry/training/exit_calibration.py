"""Predictions after each recursion step, to calibrate early exit."""

import torch
from torch import nn

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.training.augment import Normalize
from smallfry_runtime.early_exit import Trace, warn_of_few


@torch.inference_mode()
def trace(model: nn.Module, split: Split, normalize: Normalize, batch_size: int = 256) -> Trace:
    """Run every image of a split through all recursion steps of a model, on its device.

    Raises:
        UsageError: A model that takes one step, or none.
    """
    if not isinstance(model, Recursive) or model.recursion_steps < 2:
        raise UsageError(
            "early exit needs a model with several recursion steps; train one with "
            "--objective.supervision_steps 4 --model.recursion_steps 4"
        )
    if len(split) == 0:
        raise UsageError("early exit needs validation images to calibrate its threshold on")
    warn_of_few(len(split))
    weight = next(model.parameters())
    right, halting = [], []
    for rows, labels in zip(
        torch.split(split.rows, batch_size), torch.split(split.labels, batch_size), strict=True
    ):
        steps = model.eval().recurse(normalize(split.pixels[rows]).to(weight.device, weight.dtype))
        right.append(torch.stack([s.logits.argmax(1).cpu() == labels for s in steps]))
        halting.append(torch.stack([s.halt_logits.float().sigmoid().cpu() for s in steps]))
    return Trace(torch.cat(right, dim=1).numpy(), torch.cat(halting, dim=1).numpy())
