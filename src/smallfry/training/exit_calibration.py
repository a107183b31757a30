"""Predictions after each recursion step, to calibrate early exit."""

import torch
from torch import nn

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.tasks import Judges, Task
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
    """Run the images of a split through all recursion steps of a model, on its device.

    Those with nothing to be right about are left out; see ``smallfry.tasks.Judges``.

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
    weight, task = next(model.parameters()), task or task_of({})
    right, halting, judged = [], [], []
    for rows, labels in zip(
        torch.split(split.rows, batch_size), torch.split(split.labels, batch_size), strict=True
    ):
        steps = model.eval().recurse(normalize(split.pixels[rows]).to(weight.device, weight.dtype))
        outputs = [step.logits.float().cpu() for step in steps]
        targets = targets_of(task, outputs[0], labels)
        right.append(torch.stack([task.right(each, targets) for each in outputs]))
        halting.append(torch.stack([s.halt_logits.float().sigmoid().cpu() for s in steps]))
        every = torch.ones(len(labels), dtype=torch.bool)
        judged.append(task.judged(targets) if isinstance(task, Judges) else every)
    kept = torch.cat(judged)
    if not kept.any():
        raise UsageError("early exit is calibrated on validation images, and none has a truth")
    warn_of_few(int(kept.sum()))
    return Trace(*(torch.cat(each, dim=1)[:, kept].numpy() for each in (right, halting)))


def judged_part(split: Split, task: Task, classes: int) -> Split:
    """Return the samples of a split with something to be right about.

    Args:
        split: The samples, with labels.
        task: Their task.
        classes: Number of classes.
    """
    if not isinstance(task, Judges):
        return split
    outputs = torch.empty(0, task.outputs(classes))
    kept = task.judged(targets_of(task, outputs, split.labels))
    return split.take(kept.nonzero().flatten())
