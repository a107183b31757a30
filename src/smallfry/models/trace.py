"""The answers of a recursive model, latent step by latent step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.models.vitrm import RecursionStep, ViTRM


class Trace(NamedTuple):
    """What a model would answer after 0, 1, 2, … latent steps."""

    probabilities: Tensor  # (1 + latent steps, images, classes)
    halting: Tensor  # (1 + latent steps, images)


def steps_to_follow(model: ViTRM) -> int:
    """Recursion steps worth showing: those of its training, and a second one if that was one."""
    return max(2, model.recursion_steps)


def answers(model: ViTRM, images: Tensor, steps: int) -> Iterator[RecursionStep]:
    """What a model would answer after 0, 1, 2, … latent steps; see ``trace_recursion``."""
    x = model.embed(images)
    state = model.initial_state(len(images))
    yield model.read_out(model.answer(state))
    for _ in range(steps):
        for _ in range(model.latent_steps):
            state = model.think(x, state)
            asked = model.read_out(model.answer(state))
            yield asked
        state = asked.state  # the last answer of a recursion step is the one that is kept


@torch.inference_mode()
def trace_recursion(model: ViTRM, images: Tensor, steps: int) -> Trace:
    """Ask a model for its answer after every latent step.

    Args:
        model: In evaluation mode.
        images: Normalised, (images, channels, size, size).
        steps: Recursion steps to follow.
    """
    asked = list(answers(model, images, steps))
    return Trace(
        torch.stack([step.logits.softmax(dim=1) for step in asked]),
        torch.stack([step.halt_logits.sigmoid() for step in asked]),
    )
