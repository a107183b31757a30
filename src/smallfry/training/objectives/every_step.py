"""Settings of joint supervision of every recursion step."""

from dataclasses import dataclass
from typing import Any, ClassVar

from smallfry.settings import check
from smallfry.training.objectives.registry import register_objective


@register_objective
@dataclass(frozen=True)
class EveryStepSettings:
    """Mean loss of all recursion steps, differentiated through all of them at once.

    Args:
        last_weight: Weight of the last step; the others have 1.
    """

    name: ClassVar[str] = "every_step"
    last_weight: float = 1.0

    def __post_init__(self) -> None:
        check(self.last_weight > 0, "objective.last_weight must be above 0")

    def build(self, task: Any, model: Any, parts: int) -> Any:
        """Build the objective."""
        from smallfry.training.every_step import EveryStep
        from smallfry.training.objective_steps import require_recursive

        require_recursive(model, self.name)
        return EveryStep(task, model.recursion_steps, self.last_weight)
