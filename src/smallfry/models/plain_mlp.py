"""Multilayer perceptron without norms or residuals, for studies of depth.

    h ← act(W h + b),  depth − 1 times, and a linear classifier

Initial weights are PyTorch's; ``model.init critical`` makes hundreds of layers trainable.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes
from smallfry_runtime.frames import ImageSize, frame_of

__all__ = ["PlainMLP"]

SOURCE = Source("Rumelhart et al. 1986, Nature 323, 533–536")


class PlainMLP(nn.Module):
    """Multilayer perceptron of images.

    Args:
        img_size: Side of the images in pixels, or height and width.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        embed_dim: Width of the hidden layers.
        depth: Linear layers, the classifier among them.
        act_layer: Activation, by timm's name.

    Raises:
        UsageError: Fewer than two layers, or no width.

    Example:
        >>> import torch
        >>> from smallfry.models.plain_mlp import PlainMLP
        >>> PlainMLP(img_size=8, in_chans=1, depth=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: ImageSize = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 64,
        depth: int = 3,
        act_layer: str = "tanh",
    ) -> None:
        super().__init__()
        if depth < 2 or embed_dim < 1:
            raise UsageError("depth is at least 2, and embed_dim at least 1")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dim
        act = cast(type[nn.Module], get_act_layer(act_layer))
        frame = frame_of(img_size)
        sizes = [in_chans * frame.height * frame.width, *[embed_dim] * (depth - 1)]
        self.layers = nn.Sequential()
        for before, after in pairwise(sizes):
            self.layers.append(nn.Sequential(nn.Linear(before, after), act()))
        self.head = linear_classifier(embed_dim, num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; there is nothing to pool."""
        self.num_classes = num_classes
        self.head = linear_classifier(self.num_features, num_classes).to(
            next(self.layers.parameters())
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to (batch, embed_dim)."""
        return cast(Tensor, self.layers(images.flatten(1)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or return the features."""
        return features if pre_logits else cast(Tensor, self.head(features))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes)."""
        return self.forward_head(self.forward_features(images))


def _cfg() -> dict[str, Any]:
    return {
        "input_size": (1, 8, 8),
        "num_classes": 10,
        "fixed_input_size": True,
        "mean": (0.5,),
        "std": (0.5,),
        "crop_pct": 1.0,
        "first_conv": "layers.0.0",
        "classifier": "head",
    }


SIZES: dict[str, dict[str, Any]] = {
    "plain_mlp": {"img_size": 8, "in_chans": 1},
    "plain_mlp_100": {"img_size": 8, "in_chans": 1, "depth": 100},
}
default_cfgs = generate_default_cfgs({name: _cfg() for name in SIZES})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    return build(PlainMLP, name, pretrained, **SIZES[name] | kwargs)


register_sizes(__name__, SIZES, _create)
