"""Predictions of a recursive model, step by step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.models.contract import LatentRecursive, RecursionStep, Recursive


class Trace(NamedTuple):
    """Predictions of a model as it recurses, in the order of ``answers``."""

    probabilities: Tensor  # (answers, images, classes)
    halting: Tensor  # (answers, images)


def steps_to_follow(model: Recursive) -> int:
    """Count the recursion steps worth showing: those of training, and at least two."""
    return max(2, model.recursion_steps)


def answers(model: Recursive, images: Tensor, steps: int) -> Iterator[RecursionStep]:
    """Yield predictions after 0, 1, 2, … latent steps; without those, after each recursion step.

    Args:
        model: In evaluation mode.
        images: Normalised, (images, channels, size, size).
        steps: Recursion steps to follow.
    """
    if not isinstance(model, LatentRecursive):
        yield from model.recurse(images, steps)
        return
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
def trace_recursion(model: Recursive, images: Tensor, steps: int) -> Trace:
    """Collect ``answers`` of a model, with the same arguments."""
    asked = list(answers(model, images, steps))
    return Trace(
        torch.stack([step.logits.softmax(dim=1) for step in asked]),
        torch.stack([step.halt_logits.sigmoid() for step in asked]),
    )
