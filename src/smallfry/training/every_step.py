"""Joint supervision of every recursion step, with one optimizer step per batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.curvature.composite_likelihoods import as_likelihood
from smallfry.curvature.scaled import Scaled
from smallfry.models import RecursionStep
from smallfry.tasks import Batch, Task
from smallfry.training.objective_steps import Step

__all__ = ["EveryStep"]


class Recurse(nn.Module):
    """Module of all recursion steps of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[RecursionStep, ...]:
        """Return the steps, without their states."""
        model: Any = self.model
        return tuple(step._replace(state=()) for step in model.recurse(images))


@dataclass(frozen=True)
class EveryStep:
    """Weighted mean over recursion steps of the task's loss and that of the halting logit.

    Anytime networks are trained so (Huang et al. 2018, "Multi-Scale Dense Networks", arXiv
    1703.09844); the halting logit learns whether the step's answer is right, as in deep
    supervision.

    Args:
        task: The meaning of the model's outputs.
        recursion_steps: Of the model.
        last_weight: Weight of the last step; the others have 1.
    """

    task: Task
    recursion_steps: int
    last_weight: float = 1.0
    halt_threshold: float = 1.0

    @property
    def supervision_steps(self) -> int:
        """Always one."""
        return 1

    @property
    def weights(self) -> list[float]:
        """Weights of the steps, which add up to one."""
        total = self.recursion_steps - 1 + self.last_weight
        others = [1 / total] * (self.recursion_steps - 1)
        return [*others, self.last_weight / total]

    @property
    def likelihood(self) -> dict[int, Any]:
        """Likelihood of each step's heads, with the weight of the step."""
        parts: dict[str | int, Any] = {"logits": self.task.likelihood, "halt_logits": "bernoulli"}
        return {i: Scaled(as_likelihood(parts), w) for i, w in enumerate(self.weights)}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return a module for all recursion steps."""
        return Recurse(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Yield the single step of a batch."""
        steps = prepared(batch.inputs)
        total: Any = 0.0
        for step, weight in zip(steps, self.weights, strict=True):
            right = self.task.right(step.logits, batch.targets).to(step.halt_logits)
            halting = F.binary_cross_entropy_with_logits(step.halt_logits, right)
            total = total + weight * (self.task.loss(step.logits, batch.targets) + halting)
        last = steps[-1]
        yield Step(total, last.logits.detach(), last.halt_logits.detach().sigmoid())
