"""Settings of deep supervision in slots."""

from dataclasses import dataclass
from typing import Any, ClassVar

from smallfry.settings import check
from smallfry.training.objectives.registry import register_objective


@register_objective
@dataclass(frozen=True)
class SlotsSettings:
    """Deep supervision where each image halts by itself, and the next takes its place.

    Args:
        supervision_steps: The most recursion steps on an image.
        exploration: Chance that an image may not halt before a random step.
    """

    name: ClassVar[str] = "slots"
    supervision_steps: int = 1
    exploration: float = 0.1

    def __post_init__(self) -> None:
        check(self.supervision_steps >= 1, "objective.supervision_steps must be at least 1")
        check(0 <= self.exploration <= 1, "objective.exploration is 0 to 1")

    def build(self, task: Any, model: Any, parts: int) -> Any:
        """Build the objective."""
        from smallfry.training.objective_steps import require_recursive
        from smallfry.training.slots import SlotSupervision

        require_recursive(model, self.name)
        return SlotSupervision(task, self.supervision_steps, self.exploration, parts)
