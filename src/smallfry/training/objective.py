"""Training objectives: loss functions with one or several steps per batch.

An objective turns a batch into one or more steps. The loop takes an optimizer step on the loss of
each before it draws the next, so an objective that works on a batch for several steps, as deep
supervision does, is a generator that carries its state along.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.models.contract import map_tensors
from smallfry.tasks import Batch, Task
from smallfry.training.objective_steps import Advance, Step

__all__ = [
    "Batch",
    "DeepSupervision",
    "Objective",
    "Stateful",
    "Step",
    "Supervised",
    "part_of",
]


class Objective(Protocol):
    """Training objective.

    The batch is left early once the mean of ``Step.halting`` passes ``halt_threshold``.
    """

    @property
    def task(self) -> Task:
        """Meaning of the model's outputs."""

    @property
    def halt_threshold(self) -> float:
        """Mean halting probability that ends a batch."""

    @property
    def supervision_steps(self) -> int:
        """Maximum number of optimizer steps per batch."""

    @property
    def likelihood(self) -> str | dict[str, Any]:
        """Density whose negative logarithm is the loss, for natural gradient."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the module through which the objective calls the model.

        Mixed precision and distribution act on ``forward`` alone, so nothing may go past it.
        """

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Yield the steps of a batch; the loop updates the model between them."""


@runtime_checkable
class Stateful(Protocol):
    """Objective with a state of its own, which is in the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any], batch: Batch) -> None:
        """Restore it; ``batch`` is one of the training, on its device."""


def part_of(states: Sequence[dict[str, Any]], rank: int, count: int) -> dict[str, Any]:
    """Return a process's part of the state of an objective.

    Raises:
        UsageError: There were more or fewer processes.
    """
    if len(states) != count:
        raise UsageError(
            f"the objective's state is that of {len(states)} processes, not {count}: start as many"
        )
    return states[rank]


@dataclass(frozen=True)
class Supervised:
    """Loss of a task on a model's outputs: one step per batch."""

    task: Task
    halt_threshold: float = 1.0

    @property
    def supervision_steps(self) -> int:
        """Always one."""
        return 1

    @property
    def likelihood(self) -> str | dict[str, Any]:
        """Likelihood of the task."""
        return self.task.likelihood

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model itself."""
        return model

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Yield the single step of a batch."""
        outputs = prepared(batch.inputs)
        yield Step(self.task.loss(outputs, batch.targets), map_tensors(Tensor.detach, outputs))


@dataclass(frozen=True)
class DeepSupervision:
    """Deep supervision of a recursive model (arXiv 2603.19503 and 2510.04871).

    Each recursion step is trained on the task's loss + BCE(halting logit, "the prediction is
    right"), and hands its detached state to the next. The task decides what is right:
    classification compares with the unmixed label.

    Args:
        task: The meaning of the model's outputs.
        supervision_steps: Recursion steps per batch (N_sup).
        halt_threshold: Leave the batch once the mean halting probability passes this.
    """

    task: Task
    supervision_steps: int = 1
    halt_threshold: float = 0.5

    @property
    def likelihood(self) -> dict[str, Any]:
        """Joint likelihood of both heads, independent given their outputs."""
        return {"logits": self.task.likelihood, "halt_logits": "bernoulli"}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return a module for one recursion step."""
        return Advance(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Yield the steps of a batch."""
        state = None
        for number in range(1, self.supervision_steps + 1):
            step = prepared(batch.inputs, state)
            loss = self.task.loss(step.logits, batch.targets)
            right = self.task.right(step.logits, batch.targets).to(step.halt_logits)
            halting = F.binary_cross_entropy_with_logits(step.halt_logits, right)
            yield Step(
                loss + halting,
                step.logits.detach(),
                step.halt_logits.detach().sigmoid(),
                last=number == self.supervision_steps,
            )
            state = map_tensors(Tensor.detach, step.state)
