"""States of EEG windows: classification, with explanations among a run's pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from smallfry.data import Split
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.tasks import register
from smallfry.tasks.classification import Classification
from smallfry.tasks.task import TaskDefaults
from smallfry.training.augment import Normalize
from smallfry_runtime.decoders import eeg as decoder

__all__ = ["EEG"]


@register
@dataclass(frozen=True)
class EEG(Classification):
    """States of windows, one each: the core's classification with a kit's recipe and pictures."""

    name: ClassVar[str] = "eeg"
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "interpretable_cnn", "cross_entropy")
    augmentations: ClassVar[frozenset[str]] = frozenset({"mixup", "erasing", "cutout", "repeats"})
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode states; see ``smallfry_runtime.decoders.eeg``."""
        return decoder.decode(np.asarray(outputs.detach().float().cpu()), classes, settings)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the confusions, the reliability, and the power of bands over the head by state."""
        from smallfry.kits.eeg.pictures import draw_bands
        from smallfry.report.classification import confusion_matrix
        from smallfry.report.per_class import reliability_diagram

        reliability_diagram(outputs, split.labels, folder / "reliability.png")
        confusion_matrix(outputs, split.labels, classes, folder / "confusion_matrix.png")
        draw_bands(split, classes, folder / "bands.png")

    def explain(
        self,
        model: nn.Module,
        split: Split,
        normalize: Normalize,
        classes: Sequence[str],
        folder: Path,
    ) -> None:
        """Draw the explanations of the surest windows of each state, if the network has such."""
        from smallfry.kits.eeg.pictures import draw_explanations

        if isinstance(model, InterpretableCNN):
            draw_explanations(model, split, normalize, classes, folder / "explanations.png")
