"""Check for batch norms with one value per channel, which can't train."""

from typing import Any

import torch
from torch import Tensor, nn

from smallfry._torch import BatchNorm
from smallfry.errors import UsageError
from smallfry.tasks.task import micro_batch_sizes
from smallfry.training.processes import share_of
from smallfry.transforms.modes import evaluating


def require_enough_images(
    model: nn.Module,
    sample: Tensor,
    batch_size: int,
    accumulate: int,
    processes: int = 1,
    is_synchronized: bool = False,
) -> None:
    """Refuse a batch in which a batch norm would get one value per channel.

    Args:
        model: The model.
        sample: Images of the shape that it takes, (any, channels, size, size).
        batch_size: Images of a batch, of all processes together.
        accumulate: Micro-batches that each process works its share off in.
        processes: Number of processes that share a batch.
        is_synchronized: Batch norms take the values of all processes.

    Raises:
        UsageError: With what to change.
    """
    shares = [share_of(batch_size, rank, processes) for rank in range(processes)]
    sizes = [
        n
        for s in shares
        if s.stop > s.start
        for n in micro_batch_sizes(s.stop - s.start, accumulate)
    ]
    if 1 not in sizes or (is_synchronized and processes > 1):
        return
    name = _norm_of_one_value(model, sample)
    if name is None:
        return
    how = f"batch_size {batch_size}"
    if processes > 1:
        how += f" in {processes} processes"
    if accumulate > 1:
        how += f" with accumulate {accumulate}"
    raise UsageError(
        f"{how} leaves a single image for a step, and the batch norm '{name}' needs at least two "
        "to train; raise batch_size, or choose it and accumulate so that no part is one image"
    )


def _norm_of_one_value(model: nn.Module, sample: Tensor) -> str | None:
    """Find the first batch norm with one value per channel of each image; None if none."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0][0, 0].numel() == 1:
                found.append(name)

        return hook

    hooks = [
        module.register_forward_pre_hook(look(name))
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
    ]
    try:
        if hooks:
            with torch.inference_mode(), evaluating(model):
                model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
