"""Adversarial training as a wrapper of any objective for classification.

A batch is attacked through the model in evaluation mode, so that norms and natural gradient do not
take the attack for data; the wrapped objective then trains on the changed images.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.tasks import Batch
from smallfry.training.adversarial_config import AdversarialConfig
from smallfry.training.attack import PGD
from smallfry.training.augment import Normalize
from smallfry.training.objective import Objective
from smallfry.training.objective_steps import Step
from smallfry.training.wrapped_objective import WrappedObjective
from smallfry.transforms.modes import evaluating


class Adversarial(WrappedObjective):
    """Objective on attacked images.

    Args:
        objective: The one that is trained on them.
        attack: The attack; its random start comes from PyTorch's random state.
        normalize: Normalisation of the images.
    """

    def __init__(self, objective: Objective, attack: PGD, normalize: Normalize) -> None:
        super().__init__(objective)
        self.attack, self.normalize = attack, normalize
        self._model: nn.Module = nn.Identity()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the module of the wrapped objective."""
        self._model = model
        return super().prepare(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Attack the batch, and yield the wrapped objective's steps on it."""

        def loss(inputs: Tensor) -> Tensor:
            return self.task.loss(self._model(inputs), batch.targets)

        with evaluating(self._model):
            attacked = self.attack(batch.inputs, loss, self.normalize)
        yield from self.objective(prepared, batch._replace(inputs=attacked))


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
