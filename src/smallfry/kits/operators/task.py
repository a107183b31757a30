"""Regression of fields, by relative errors in L² or H¹."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults
from smallfry_runtime.decoders import operators as decoder

__all__ = ["Operators", "relative_h1", "relative_l2"]

CUT = 20  # frequencies from which the weight of H¹ has no component, as in the authors' code
RIGHT = 0.05  # relative L² below which a field counts as right
SHOWN = 4  # fields of a picture


def relative_l2(found: Tensor, wanted: Tensor) -> Tensor:
    """Compute ‖found − wanted‖ / ‖wanted‖ of each sample, (samples,)."""
    errors, norms = (each.flatten(1).norm(dim=1) for each in (found - wanted, wanted))
    ratios: Tensor = errors / norms
    return ratios


def relative_h1(found: Tensor, wanted: Tensor, cut: int = CUT) -> Tensor:
    """Compute the same in H¹ on the torus, (samples,).

    The weight of a frequency is √(1 + k²), with whole k and without 2π; a component of k from
    ``cut`` on counts as 0 in it, as in the authors' code (xlliu2017/MgNO).

    Args:
        found: (samples, fields, height, width).
        wanted: The same.
        cut: First frequency that is left out.
    """
    squares = []
    for n in wanted.shape[-2:]:
        k = torch.fft.fftfreq(n, 1 / n, device=wanted.device, dtype=wanted.dtype).abs()
        squares.append(torch.where(k >= cut, 0.0, k).square())
    weight = (1 + squares[0][:, None] + squares[1]).sqrt()
    errors, norms = (
        (torch.fft.fft2(each).abs() * weight).flatten(1).norm(dim=1)
        for each in (found - wanted, wanted)
    )
    ratios: Tensor = errors / norms
    return ratios


@register
@dataclass(frozen=True)
class Operators:
    """Fields: outputs and labels (samples, fields, height, width), in physical units.

    The loss is the mean relative error in H¹. It is no likelihood; natural gradient takes the
    Gaussian of the mean squared error, whose metric it shares up to the scale of each sample.
    """

    name: ClassVar[str] = "operators"
    likelihood: ClassVar[str] = "gaussian_mean"
    choices: ClassVar[tuple[str, ...]] = ("l2_error", "h1_error", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "mgno_tiny", "cross_entropy")
    augmentations: ClassVar[frozenset[str]] = frozenset({"repeats"})
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def outputs(self, classes: int) -> int:
        """Return the number of fields."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the fields.

        Raises:
            UsageError: The data has classes, not fields.
        """
        if labels.ndim != 4 or not labels.is_floating_point():
            raise UsageError(
                "the task operators needs fields to learn: --data operators-darcy or "
                "operators-helmholtz"
            )
        return labels

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the relative error in H¹ of each sample, (samples,)."""
        return relative_h1(outputs.float(), targets.float())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean relative error in H¹."""
        return self.losses(outputs, targets).mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mark the samples with a relative error in L² below 5 %, (samples,)."""
        return relative_l2(outputs.float(), targets.float()) < RIGHT

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute mean relative errors, the largest, and the share of samples below 5 %."""
        l2, h1 = (each(outputs.double(), labels.double()) for each in (relative_l2, relative_h1))
        return {
            "loss": h1.mean().item(),
            "accuracy": (l2 < RIGHT).double().mean().item(),
            "l2_error": l2.mean().item(),
            "h1_error": h1.mean().item(),
            "worst_l2_error": l2.max().item(),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by the error in L²."""
        return (-scores["l2_error"],)

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode fields; settings are ``smallfry_runtime.decoders.operators.Settings``."""
        return decoder.decode(outputs.detach().float().cpu().numpy(), classes, settings)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw given fields, truth, answers and errors of the best, middle and worst samples."""
        from smallfry.kits.operators.pictures import draw_fields

        errors = relative_l2(outputs, split.labels)
        order = errors.argsort()
        chosen = order[torch.linspace(0, len(order) - 1, min(SHOWN, len(order))).long()]
        draw_fields(
            split.take(chosen).images, split.labels[chosen], outputs[chosen], folder / "fields.png"
        )
