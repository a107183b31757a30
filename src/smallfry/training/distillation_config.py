"""Settings of distillation."""

import math
from dataclasses import dataclass

from smallfry.errors import UsageError
from smallfry.training.settings import settle


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation: a trained model's predictions as targets, beside the labels.

    Args:
        teacher: A run folder, a checkpoint in one, a shared folder or hf_hub:USER/NAME, of the same
            classes; without one, nothing is distilled.
        weight: Share of the loss that compares with the teacher, 0 to 1; the rest is the
            objective's.
        temperature: Logits of both are divided by it; above 1, unlikely classes count more.
        features: Weight of the similarities between images in the inputs of both classifiers, of
            any widths, added to the loss; 0 leaves them out.
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 4.0
    features: float = 0.0

    def __post_init__(self) -> None:
        settle(self, "distillation.")
        if not 0 <= self.weight <= 1:
            raise UsageError(f"distillation.weight is 0 to 1, not {self.weight}")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"distillation.temperature must be positive, not {self.temperature}")
        if not 0 <= self.features < math.inf:
            raise UsageError(f"distillation.features is 0 or more, not {self.features}")
