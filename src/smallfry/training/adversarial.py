"""Adversarial training as a wrapper of any objective for classification.

A batch is attacked through the model in evaluation mode, so that norms and natural gradient do not
take the attack for data; the wrapped objective then trains on the changed images.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.tasks import Batch, Task
from smallfry.training.adversarial_config import AdversarialConfig
from smallfry.training.attack import PGD
from smallfry.training.augment import Normalize
from smallfry.training.objective import Objective, Stateful
from smallfry.training.objective_steps import Step


class Adversarial:
    """Objective on attacked images.

    Args:
        objective: The one that is trained on them.
        attack: The attack; its random start comes from PyTorch's random state.
        normalize: Normalisation of the images.
    """

    def __init__(self, objective: Objective, attack: PGD, normalize: Normalize) -> None:
        self.objective, self.attack, self.normalize = objective, attack, normalize
        self._model: nn.Module = nn.Identity()

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
    def likelihood(self) -> str | dict[str, str]:
        """Likelihood of the wrapped objective."""
        return self.objective.likelihood

    @property
    def changes_gradients(self) -> bool:
        """True if the wrapped objective's gradients are not those of its likelihood."""
        return bool(getattr(self.objective, "changes_gradients", False))

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the module of the wrapped objective."""
        self._model = model
        return self.objective.prepare(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Attack the batch, and yield the wrapped objective's steps on it."""

        def loss(inputs: Tensor) -> Tensor:
            return self.task.loss(self._model(inputs), batch.targets)

        was_training = self._model.training
        self._model.eval()
        try:
            attacked = self.attack(batch.inputs, loss, self.normalize)
        finally:
            self._model.train(was_training)
        yield from self.objective(prepared, batch._replace(inputs=attacked))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped objective, if it has one."""
        return self.objective.state_dict() if isinstance(self.objective, Stateful) else {}

    def load_state_dict(self, state: dict[str, Any], batch: Batch) -> None:
        """Restore the state of the wrapped objective."""
        if isinstance(self.objective, Stateful):
            self.objective.load_state_dict(state, batch)


def adversarial(config: AdversarialConfig, objective: Objective, normalize: Normalize) -> Objective:
    """Wrap an objective with the configured attack; without one, it is returned as it is.

    Raises:
        UsageError: Another task.
    """
    if not config.eps:
        return objective
    if objective.task.name != "classification":
        raise UsageError(f"adversarial training is for classification, not {objective.task.name}")
    return Adversarial(objective, PGD(config.eps, config.step, config.steps), normalize)
