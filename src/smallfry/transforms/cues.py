"""Cue tokens beside those of the image, in a model with a place for them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from smallfry.layers.prefix_cues import PrefixCues
from smallfry.order import Stage
from smallfry.transforms.registry import register

MOST = 4096  # anchors or tokens


@register
@dataclass(frozen=True)
class Cues:
    """Cue tokens of a ViTRM, of its assignment of an image to a teacher's anchors.

    Args:
        anchors: Number of anchors.
        tokens: Number of cue tokens.

    Example:
        >>> import torch
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.cues import Cues
        >>> model = build(ModelSpec("vitrm_micro_patch4_8").then(Cues(anchors=16)))
        >>> model.embed(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 8, 64])
    """

    kind: ClassVar[str] = "cues"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.ARCHITECTURE

    anchors: int
    tokens: int = 4

    def __post_init__(self) -> None:
        for name in ("anchors", "tokens"):
            count = getattr(self, name)
            if type(count) is not int or not 1 <= count <= MOST:
                raise ValueError(f"{name} is a number from 1 to {MOST}, got {count!r}")

    def apply(self, model: nn.Module) -> None:
        """Add the layer that makes them.

        Raises:
            ValueError: The model has no place for cues, or has some.
        """
        place: Any = model
        if getattr(model, "cues", model) is not None:
            raise ValueError(f"{type(model).__name__} has no place for cues: take a ViTRM")
        place.cues = PrefixCues(place.embed_dim, self.anchors, self.tokens)
        place.cues.to(next(model.parameters()))
        place.why_no_rollout = "some of its tokens are no patches of the image"
