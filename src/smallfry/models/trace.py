"""The answers of a recursive model, latent step by latent step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.models.vitrm import RecursionStep, ViTRM


class Trace(NamedTuple):
    """Probabilities that a model gives after 0, 1, 2, … latent steps."""

    probabilities: Tensor  # (1 + latent steps, images, classes)
    halting: Tensor  # (1 + latent steps, images)


def steps_to_follow(model: ViTRM) -> int:
    """Recursion steps to show: those of the model's training, and a second one if that was one."""
    return max(2, model.recursion_steps)


def answers(model: ViTRM, images: Tensor, steps: int) -> Iterator[RecursionStep]:
    """Yield a model's outputs after 0, 1, 2, … latent steps."""
    x = model.embed(images)
    state = model.initial_state(len(images))
    yield model.read_out(model.answer(state))
    for _ in range(steps):
        for _ in range(model.latent_steps):
            state = model.think(x, state)
            output = model.read_out(model.answer(state))
            yield output
        state = output.state  # the last answer of a recursion step is the one that is kept


@torch.inference_mode()
def trace_recursion(model: ViTRM, images: Tensor, steps: int) -> Trace:
    """Trace the probabilities that a model gives after every latent step.

    Args:
        model: In evaluation mode.
        images: Normalised, (images, channels, size, size).
        steps: Recursion steps to follow.
    """
    outputs = list(answers(model, images, steps))
    return Trace(
        torch.stack([step.logits.softmax(dim=1) for step in outputs]),
        torch.stack([step.halt_logits.sigmoid() for step in outputs]),
    )
