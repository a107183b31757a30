"""Base of objectives around another one."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from smallfry.tasks import Batch, Task
from smallfry.training.objective import Objective, Stateful
from smallfry.training.objective_steps import Step


class WrappedObjective:
    """Objective around another, with changes to its batches or losses.

    Args:
        objective: The wrapped one.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @property
    def task(self) -> Task:
        """Meaning of the model's outputs."""
        return self.objective.task

    @property
    def halt_threshold(self) -> float:
        """Mean halting probability that ends a batch."""
        return self.objective.halt_threshold

    @property
    def supervision_steps(self) -> int:
        """Maximum number of optimizer steps per batch."""
        return self.objective.supervision_steps

    @property
    def likelihood(self) -> str | dict[str, Any]:
        """Likelihood of the wrapped objective."""
        return self.objective.likelihood

    @property
    def changes_gradients(self) -> bool:
        """True if the gradients are not those of the likelihood."""
        return bool(getattr(self.objective, "changes_gradients", False))

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the module of the wrapped objective."""
        return self.objective.prepare(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Yield the wrapped objective's steps."""
        yield from self.objective(prepared, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped objective, if it has one."""
        return self.objective.state_dict() if isinstance(self.objective, Stateful) else {}

    def load_state_dict(self, state: dict[str, Any], batch: Batch) -> None:
        """Restore the state of the wrapped objective."""
        if isinstance(self.objective, Stateful):
            self.objective.load_state_dict(state, batch)
