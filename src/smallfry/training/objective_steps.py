"""Steps of an objective."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Step"]


class Step(NamedTuple):
    """Loss of an objective for one optimizer step."""

    loss: Tensor  # scalar, mean over the batch
    outputs: Tensor  # (batch, ...), detached
    halting: Tensor | None = None  # (batch,), probability of having finished, detached
    last: bool = True  # the objective has nothing more to do on this batch
