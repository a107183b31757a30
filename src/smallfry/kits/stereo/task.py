"""Disparity and classes of every pixel from two views: loss, scores, decoding and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from smallfry.data import Split
from smallfry.kits.stereo import losses
from smallfry.kits.stereo.metrics import full_disparity, score
from smallfry.kits.stereo.models import FACTORS
from smallfry.kits.stereo.truth import Truth, unpack
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults, share_of
from smallfry_runtime.decoders import stereo as decoder

__all__ = ["Stereo"]

DENSITIES = {"refined": "gaussian_mean", "semantics": "categorical_mean"}


@register
@dataclass(frozen=True)
class Stereo:
    """Semantic stereo: outputs are ``StereoOutput``, labels rows of ``truth.pack``.

    A pair counts as right if the mean error of the last exit's refined disparity is below a pixel,
    over the points that both views see. The likelihood is that of refined disparities and classes:
    natural gradient takes its curvature, not the loss's weights.
    """

    name: ClassVar[str] = "stereo"
    likelihood: ClassVar[Any] = {
        f"{name}{factor}": density for factor in FACTORS for name, density in DENSITIES.items()
    }
    augmentations: ClassVar[frozenset[str]] = frozenset()
    choices: ClassVar[tuple[str, ...]] = ("disparity_error", "miou", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "rts2net_c4", "cross_entropy")
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def outputs(self, classes: int) -> int:
        """Return the number of classes of pixels."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Truth:
        """Unpack the truth of pairs.

        Raises:
            DataError: The data has no disparities.
        """
        return unpack(labels)

    def losses(self, outputs: Any, targets: Truth) -> Tensor:
        """Compute the loss of each pair, (pairs,)."""
        return losses.total(outputs, targets)

    def terms(self, outputs: Any, targets: Truth) -> dict[str, Tensor]:
        """Compute the terms of the loss, (pairs,) each, weighted by neither."""
        return losses.terms(outputs, targets)

    def loss(self, outputs: Any, targets: Truth) -> Tensor:
        """Compute the mean loss of pairs."""
        return self.losses(outputs, targets).mean()

    def right(self, outputs: Any, targets: Truth) -> Tensor:
        """Mark the pairs with a mean disparity error below a pixel, (pairs,).

        A pair without a known point that both views see is not right.
        """
        factor = FACTORS[len(outputs) // 3 - 1]
        error = (full_disparity(outputs[-2], factor) - targets.disparity).abs()
        chosen = targets.known & ~targets.hidden
        return (error * chosen).sum(dim=(1, 2)) < chosen.sum(dim=(1, 2))

    def judged(self, targets: Truth) -> Tensor:
        """Mark the pairs with a known point that both views see, (pairs,)."""
        return (targets.known & ~targets.hidden).any(dim=2).any(dim=1)

    def metrics(self, outputs: Any, labels: Tensor) -> dict[str, float]:
        """Score a split: the loss, the share of right pairs, and ``metrics.score``.

        ``disparity_error`` and ``miou`` are those of the last exit.
        """
        truth = unpack(labels)
        found = score(outputs, truth)
        last = len(outputs) // 3
        return {
            "loss": self.loss(outputs, truth).item(),
            "accuracy": share_of(self.right(outputs, truth), self.judged(truth)),
            "disparity_error": found[f"epe_{last}"],
            "miou": found[f"miou_{last}"],
            **found,
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by the disparity error, then by classes."""
        return -scores["disparity_error"], scores["miou"]

    def decode(
        self, outputs: Any, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode maps; settings are ``smallfry_runtime.decoders.stereo.Settings``."""
        arrays = {name: value.detach().cpu().numpy() for name, value in outputs._asdict().items()}
        return decoder.decode(arrays, classes, settings)

    def draw(self, outputs: Any, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the pairs with the largest errors: views, truth, exits and errors."""
        from smallfry.kits.stereo.pictures import draw_exits, draw_pairs

        truth = unpack(split.labels)
        draw_pairs(outputs, split, truth, folder / "stereo.png")
        draw_exits(score(outputs, truth), folder / "exits.png")
