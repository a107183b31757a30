"""Settings of deep supervision."""

from dataclasses import dataclass
from typing import Any, ClassVar

from smallfry.settings import check
from smallfry.training.objectives.registry import register_objective


@register_objective
@dataclass(frozen=True)
class DeepSupervisionSettings:
    """Loss of each recursion step, for recursive models.

    Args:
        supervision_steps: Recursion steps on a batch, each with an optimizer step (N_sup).
        halt_threshold: Leave the batch once the mean halting probability passes this.
    """

    name: ClassVar[str] = "deep_supervision"
    supervision_steps: int = 1
    halt_threshold: float = 0.5

    def __post_init__(self) -> None:
        check(self.supervision_steps >= 1, "objective.supervision_steps must be at least 1")

    def build(self, task: Any, model: Any, parts: int) -> Any:
        """Build the objective."""
        from smallfry.training.objective import DeepSupervision
        from smallfry.training.objective_steps import require_recursive

        require_recursive(model, self.name)
        return DeepSupervision(task, self.supervision_steps, self.halt_threshold)
