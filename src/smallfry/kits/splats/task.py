"""Regression of the attributes of Gaussians, by errors weighted with their importance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from smallfry.data import Split
from smallfry.kits.splats.cameras import around, psnr
from smallfry.kits.splats.data import TEST_VIEW
from smallfry.kits.splats.labels import Labels
from smallfry.kits.splats.render import Camera, render
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults, share_of
from smallfry_runtime.decoders import splats as decoder

__all__ = ["Splats"]

RIGHT = 0.1  # mean squared error, in variances, below which a Gaussian counts as right
PIXELS = 64
TEST_VIEWS, OTHER_VIEWS = 6, 2
HIGHEST = 200.0  # dB, of equal images


@register
@dataclass(frozen=True)
class Splats:
    """Attributes: outputs (samples, columns) before activation, labels of ``labels.Labels``.

    The loss is the mean squared error of columns divided by their deviations over the scene, with
    the importance of each Gaussian as its weight. Scores compare pictures of the whole scene with
    pictures of the decoded one, from cameras between those of the importance.
    """

    name: ClassVar[str] = "splats"
    likelihood: ClassVar[str] = "gaussian_mean"
    choices: ClassVar[tuple[str, ...]] = ("psnr", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "splats_tiny", "cross_entropy")
    augmentations: ClassVar[frozenset[str]] = frozenset({"repeats"})
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def outputs(self, classes: int) -> int:
        """Return the number of columns."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the labels.

        Raises:
            UsageError: The data has other labels.
        """
        return Labels(labels).rows

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the weighted error of each Gaussian, (samples,)."""
        return _errors(outputs, targets) * Labels(targets).importance.float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean of the weighted errors."""
        return self.losses(outputs, targets).mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mark the kept Gaussians whose error is below a tenth of the variance, (samples,)."""
        return (_errors(outputs, targets) < RIGHT) & self.judged(targets)

    def judged(self, targets: Tensor) -> Tensor:
        """Mark the Gaussians that are kept, (samples,)."""
        return Labels(targets).kept

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute errors of the Gaussians that are kept, and ratios of pictures in dB."""
        known = Labels(labels)
        kept = known.kept
        if not kept.any():
            return {"loss": 0.0, "accuracy": 0.0, "psnr": 0.0, "worst_psnr": 0.0}
        weights = known.importance[kept].double()
        errors = _errors(outputs, labels)[kept].double()
        pairs = [pair for _, *pair in pictures(outputs, known)]
        ratios = [min(HIGHEST, psnr(*pair)) for pair in pairs]
        return {
            "loss": float((errors * weights).sum() / weights.sum()),
            "accuracy": share_of(self.right(outputs, labels), kept),
            "psnr": float(np.mean(ratios)),
            "worst_psnr": float(np.min(ratios)),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by the pictures, then by the loss."""
        return scores["psnr"], -scores["loss"]

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode attributes; settings are those of ``smallfry_runtime.decoders.splats``: none."""
        return decoder.decode(outputs.detach().float().cpu().numpy(), classes, settings)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw originals, decoded scenes and their differences from each view."""
        from smallfry.kits.splats.pictures import draw_views

        known = Labels(split.labels)
        if known.kept.any():
            draw_views([pair for _, *pair in pictures(outputs, known)], folder / "views.png")


def _errors(outputs: Tensor, labels: Tensor) -> Tensor:
    known = Labels(labels)
    differences = (outputs.float() - known.attributes.float()) / known.deviations.float()
    return differences.square().mean(1)


@torch.no_grad()
def pictures(outputs: Tensor, known: Labels) -> list[tuple[Camera, Any, Any]]:
    """Render decoded and original scene, in this order, from the views of labels."""
    original, decoded = known.scene(), known.scene(outputs)
    views = TEST_VIEWS if known.view == TEST_VIEW else OTHER_VIEWS
    cameras = around(original.positions, views, PIXELS, known.view)
    return [(each, render(decoded, each), render(original, each)) for each in cameras]
