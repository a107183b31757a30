"""Redundant recursion steps of a model.

Steps share their weights, so that none is driven to zero for one of them. A step at zero leaves
the state as it is, and a model with one of n equal steps at zero is the model with n − 1. Which
number of steps falls is chosen by measurement: the outputs without one more step. Modules of the
last steps alone, such as their norms, leave with them: a model lists them by ``modules_of_steps``.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smallfry.compress.prune.candidates import Connections
from smallfry.transforms.erased import without_steps
from smallfry.transforms.shorten import STEPS, steps_of


class LeftOut(NamedTuple):
    """Omitted step."""

    name: str  # of the number of steps
    kept: int  # steps that stay
    change: float  # of the outputs against those of all steps, relative to their norm


def numbers_of_steps(model: nn.Module, example: Tensor) -> list[str]:
    """Find the numbers of steps that can fall, down to one, with every layer still in use.

    Args:
        model: Left as it is.
        example: A batch of inputs.
    """
    found = [name for name in sorted(STEPS) if steps_of(model, name) > 1]
    if not found:
        return []
    connections = Connections(model, example)
    return [name for name in found if connections.hold([without_steps(model, {name: 1})])]


@torch.no_grad()
def choose_steps(
    model: nn.Module, names: Sequence[str], number: int, example: Tensor
) -> list[LeftOut]:
    """Choose steps one after the other, each time those whose absence changes the outputs least.

    Args:
        model: Left as it is.
        names: Numbers of steps that can fall.
        number: How many steps go; below the sum of all that can.
        example: A batch of inputs.
    """
    trial = copy.deepcopy(model).eval()
    counts = {name: steps_of(model, name) for name in names}
    whole = trial(example).double()
    chosen = []
    for _ in range(number):
        trials = []
        for name in (name for name in names if counts[name] > 1):
            setattr(trial, name, counts[name] - 1)
            distance = (trial(example).double() - whole).norm() / whole.norm().clamp(min=1e-12)
            setattr(trial, name, counts[name])
            trials.append(LeftOut(name, counts[name] - 1, distance.item()))
        chosen.append(min(trials, key=lambda each: each.change))
        counts[chosen[-1].name] -= 1
        setattr(trial, chosen[-1].name, counts[chosen[-1].name])
    return chosen
