"""Settings of distillation."""

import math
from dataclasses import dataclass

from smallfry.settings import check, check_switched_on, check_values


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
        check_values(self, "distillation.")
        check(0 <= self.weight <= 1, f"distillation.weight is 0 to 1, not {self.weight}")
        positive = 0 < self.temperature < math.inf
        check(positive, f"distillation.temperature must be positive, not {self.temperature}")
        enough = 0 <= self.features < math.inf
        check(enough, f"distillation.features is 0 or more, not {self.features}")
        check_switched_on(self, "distillation.", "teacher", "runs/a")
