"""Imitation of a flight policy: classification of pictures and last actions into actions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.kits.uav.flight import ACTIONS
from smallfry.tasks import register
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.tasks.task import TaskDefaults
from smallfry_runtime.decoders import uav_policy as decoder

__all__ = ["UAVPolicy"]

COLOURS = 3
SHOWN = 12  # mistakes of a picture


@register
@dataclass(frozen=True)
class UAVPolicy(Classification):
    """Actions: logits (frames, actions), labels (frames,), as of classification.

    Neighbouring frames of a flight are alike, so flights are held out as a whole. Images are never
    mirrored: left would stay left. Nor are they blanked or recoloured: four of the channels are the
    last action.
    """

    name: ClassVar[str] = "uav-policy"
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "pilot_net", "cross_entropy")
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe_policy.yaml"
    augmentations: ClassVar[frozenset[str]] = frozenset({"repeats"})

    def targets(self, labels: Tensor, shares: Tensor) -> ClassTargets:
        """Return labels and probabilities of actions.

        Raises:
            UsageError: The data has other classes than the actions.
        """
        if labels.ndim != 1 or shares.shape[1:] != (len(ACTIONS),):
            raise UsageError(
                f"the task uav-policy chooses one of {', '.join(ACTIONS)}: name flights (--data "
                "uav-flights)"
            )
        return super().targets(labels, shares)

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Return the best action and the probability of each.

        Raises:
            UsageError: There are settings, and it has none.
        """
        return decoder.decode(np.asarray(outputs.detach().float().cpu()), classes, settings)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the confusion matrix, reliability and the most confident mistakes."""
        from smallfry.report.classification import confusion_matrix, mistakes, surest_mistakes
        from smallfry.report.per_class import reliability_diagram

        labels = split.labels
        reliability_diagram(outputs, labels, folder / "reliability.png")
        confusion_matrix(outputs, labels, classes, folder / "confusion_matrix.png")
        wrong = surest_mistakes(outputs, labels)[:SHOWN]
        shown = split.take(wrong).images[:, :COLOURS]
        mistakes(shown, outputs[wrong], labels[wrong], classes, folder / "mistakes.png")
