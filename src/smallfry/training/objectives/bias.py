"""Settings of the bias loss."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from smallfry.settings import check
from smallfry.training.objectives.registry import register_objective


@register_objective
@dataclass(frozen=True)
class BiasSettings:
    """Cross-entropy weighed by the variety of features (arXiv 2107.11170).

    Args:
        alpha: Factor of the variance of features in the weights.
        beta: What is taken off these weights.
        normalization: Lowest variance: that of each batch, or the running minimum.
    """

    name: ClassVar[str] = "bias"
    alpha: float = 0.3
    beta: float = 0.3
    normalization: Literal["batch", "running"] = "batch"

    def __post_init__(self) -> None:
        check(self.alpha >= 0 <= self.beta < 1, "objective.alpha is at least 0, beta 0 to below 1")

    def build(self, task: Any, model: Any, parts: int) -> Any:
        """Build the objective."""
        from smallfry.training.bias_loss import BiasLoss, RunningBiasLoss

        kind = RunningBiasLoss if self.normalization == "running" else BiasLoss
        return kind(task, self.alpha, self.beta)
