"""Predictions after each recursion step, to calibrate early exit."""

import torch
from torch import nn

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.tasks import Task
from smallfry.training.augment import Normalize
from smallfry.training.evaluation import targets_of, task_of
from smallfry_runtime.early_exit import Trace, warn_of_few


@torch.inference_mode()
def trace(
    model: nn.Module,
    split: Split,
    normalize: Normalize,
    batch_size: int = 256,
    task: Task | None = None,
) -> Trace:
    """Run every image of a split through all recursion steps of a model, on its device.

    Args:
        model: The model.
        split: The images, with labels.
        normalize: Turns pixels into inputs.
        batch_size: Images at a time.
        task: Which answers are right; default classification.

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
    weight, task = next(model.parameters()), task or task_of({})
    right, halting = [], []
    for rows, labels in zip(
        torch.split(split.rows, batch_size), torch.split(split.labels, batch_size), strict=True
    ):
        steps = model.eval().recurse(normalize(split.pixels[rows]).to(weight.device, weight.dtype))
        outputs = [step.logits.float().cpu() for step in steps]
        found = [task.right(each, targets_of(task, each, labels)) for each in outputs]
        right.append(torch.stack(found))
        halting.append(torch.stack([s.halt_logits.float().sigmoid().cpu() for s in steps]))
    return Trace(torch.cat(right, dim=1).numpy(), torch.cat(halting, dim=1).numpy())
