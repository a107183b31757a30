"""Rules of matrices: classification, with the graph of a program among a run's pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from smallfry.data import Split
from smallfry.kits.symbolic.models import GSSNN
from smallfry.tasks import register
from smallfry.tasks.classification import Classification
from smallfry.tasks.task import TaskDefaults
from smallfry.training.augment import Normalize
from smallfry_runtime.decoders import symbolic as decoder

__all__ = ["Symbolic"]


@register
@dataclass(frozen=True)
class Symbolic(Classification):
    """Rules of matrices: the core's classification with a kit's recipe and pictures.

    Mirrored matrices keep their label, as a row that changes from left to right does so backwards;
    shifted, cropped or mixed ones need not.
    """

    name: ClassVar[str] = "symbolic"
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "gssnn_tiny", "cross_entropy")
    augmentations: ClassVar[frozenset[str]] = frozenset({"flip", "repeats"})
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode rules; see ``smallfry_runtime.decoders.symbolic``."""
        return decoder.decode(np.asarray(outputs.detach().float().cpu()), classes, settings)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the confusions, the reliability, and matrices with their answers."""
        from smallfry.kits.symbolic.pictures import draw_answers
        from smallfry.report.classification import confusion_matrix
        from smallfry.report.per_class import reliability_diagram

        reliability_diagram(outputs, split.labels, folder / "reliability.png")
        confusion_matrix(outputs, split.labels, classes, folder / "confusion_matrix.png")
        draw_answers(outputs, split, classes, folder / "panels.png")

    def explain(
        self,
        model: nn.Module,
        split: Split,
        normalize: Normalize,
        classes: Sequence[str],
        folder: Path,
    ) -> None:
        """Draw the graph of the program, if the network has one."""
        from smallfry.kits.symbolic.pictures import draw_graphs

        if isinstance(model, GSSNN) and model.graph is not None:
            draw_graphs([model.graph], folder / "program.png")
