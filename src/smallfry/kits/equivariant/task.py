"""Classification by a network whose answer should not change under maps of the plane."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from smallfry.data import Split
from smallfry.kits.equivariant.models import GResNet
from smallfry.tasks import register
from smallfry.tasks.classification import Classification
from smallfry.tasks.task import TaskDefaults
from smallfry_runtime.decoders import equivariant as decoder

__all__ = ["Equivariant", "turned_alike"]

SHOWN = 100  # images whose turned answers are compared for the picture
ANGLES = range(0, 361, 30)


@torch.no_grad()
def turned_alike(
    model: nn.Module, images: Tensor, turns: int = 1, batch: int = 128
) -> tuple[Tensor, Tensor]:
    """Compare the answers to images and to the same images after quarter turns.

    Args:
        model: In evaluation mode; images to logits.
        images: (images, channels, side, side), normalised.
        turns: Quarter turns.
        batch: Images at a time.

    Returns:
        Whether the most probable class is the same, (images,), and the largest change of a logit.

    Example:
        >>> import torch
        >>> from smallfry.kits.equivariant.models import GResNet
        >>> model = GResNet(width=4, samples=4, sampling="turns").eval()
        >>> same, change = turned_alike(model, torch.rand(3, 1, 16, 16))
        >>> bool(same.all()), bool(change.max() < 1e-3)
        (True, True)
    """
    same, change = [], []
    for part in torch.split(images, batch):
        upright, turned = model(part), model(part.rot90(turns, (2, 3)))
        same.append(upright.argmax(1) == turned.argmax(1))
        change.append((upright - turned).abs().amax(1))
    return torch.cat(same), torch.cat(change)


@register
@dataclass(frozen=True)
class Equivariant(Classification):
    """Classes: logits (images, classes), labels (images,), as of classification.

    Its recipe has a network that is equivariant to quarter turns, and digits that are upright in
    training and distorted in the test. A run also shows how many answers stay when images turn.
    """

    name: ClassVar[str] = "equivariant"
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "gl2_resnet_turns", "cross_entropy")
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Return the most probable class and the probability of each.

        Raises:
            UsageError: There are settings, and it has none.
        """
        return decoder.decode(np.asarray(outputs.detach().float().cpu()), classes, settings)

    def explain(
        self,
        model: nn.Module,
        split: Split,
        normalize: Callable[[Tensor], Tensor],
        classes: Sequence[str],
        folder: Path,
    ) -> None:
        """Draw the share of right answers by the angle that images are turned by, and a few."""
        from smallfry.kits.equivariant.pictures import accuracy_by_angle, draw_turns

        some = split.take(torch.linspace(0, len(split) - 1, min(SHOWN, len(split))).long())
        found = accuracy_by_angle(model, some.images, some.labels, normalize, ANGLES)
        kind = f"{model.group}, {model.sampling}" if isinstance(model, GResNet) else ""
        draw_turns(some.images, {kind: found}, ANGLES, folder / "turns.png")
