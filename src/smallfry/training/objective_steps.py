"""Steps of an objective, and the module through which recursive ones call the model."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.models.contract import replace_tensors, tensors

__all__ = ["Advance", "Step", "choose", "require_recursive"]


class Step(NamedTuple):
    """Loss of an objective for one optimizer step."""

    loss: Tensor  # scalar, mean over the batch
    outputs: Any  # (batch, ...), detached; or a named tuple of such tensors
    halting: Tensor | None = None  # (batch,), probability of having finished, detached
    last: bool = True  # the objective has nothing more to do on this batch
    targets: Any = None  # of the outputs, where they are not those of the batch


class Advance(nn.Module):
    """Module whose forward is ``model.advance``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, state: Any, restarted: Tensor | None = None) -> Any:
        """Run one recursion step.

        Args:
            images: (batch, ...).
            state: State of the model; None for the initial one.
            restarted: (batch,), bool: where to take the initial state all the same.
        """
        model: Any = self.model
        if restarted is not None:
            state = choose(restarted, model.initial_state(len(images)), state)
        return model.advance(images, state)


def choose(rows: Tensor, first: Any, second: Any) -> Any:
    """Take the marked rows of a structure of tensors, and the others of one like it."""
    merged = [
        torch.where(rows.view(-1, *(1 for _ in a.shape[1:])), a, b)
        for a, b in zip(tensors(first), tensors(second), strict=True)
    ]
    return replace_tensors(first, merged)


def require_recursive(model: nn.Module, name: str) -> None:
    """Require a recursive model for the objective of this name.

    Raises:
        UsageError: It is not.
    """
    if not isinstance(model, Recursive):
        raise UsageError(
            f"{name} needs a recursive model, not {type(model).__name__}; "
            "take objective.name cross_entropy"
        )
