"""Loss of the task on the model's outputs."""

from dataclasses import dataclass
from typing import Any, ClassVar

from smallfry.training.objectives.registry import register_objective


@register_objective
@dataclass(frozen=True)
class CrossEntropySettings:
    """Loss of the task, which is cross-entropy where it is classification; any model."""

    name: ClassVar[str] = "cross_entropy"

    def build(self, task: Any, model: Any, parts: int) -> Any:
        """Build the objective."""
        from smallfry.training.objective import Supervised

        return Supervised(task)
