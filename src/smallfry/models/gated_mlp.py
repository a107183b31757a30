"""Networks of gated residual layers on flat inputs: small images and tables.

    h ← W x + b;   h ← layer(h), ``depth`` times;   logits ← linear(h)

The layers are those of ``layers.gated_residual``.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.layers.gated_residual import GatedResidual, Highway
from smallfry.models.sources import Source, register_sizes

SOURCE = Source("Lim et al. 2019, arXiv 1912.09363; Srivastava et al. 2015, arXiv 1505.00387")


class GatedMLP(nn.Module):
    """Multilayer network of gated residual or highway layers.

    A table of n columns is images of n channels and one pixel.

    Args:
        img_size: Side of the images, or height and width.
        in_chans: Channels.
        num_classes: Classes; 0 leaves the classifier out.
        embed_dim: Features.
        depth: Layers.
        kind: ``grn`` (gated residual) or ``highway``.
        drop_rate: Dropout in the layers.

    Raises:
        UsageError: Another kind.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 8,
        in_chans: int = 1,
        num_classes: int = 10,
        embed_dim: int = 64,
        depth: int = 2,
        kind: Literal["grn", "highway"] = "grn",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in ("grn", "highway"):
            raise UsageError(f"kind is grn or highway, not '{kind}'")
        height, width = to_2tuple(img_size)
        self.num_classes, self.num_features = num_classes, embed_dim
        self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        self.embed = nn.Linear(in_chans * height * width, embed_dim)
        self.blocks = nn.Sequential(
            *(
                GatedResidual(embed_dim, embed_dim, embed_dim, drop_rate)
                if kind == "grn"
                else Highway(embed_dim, drop_rate)
                for _ in range(depth)
            )
        )
        self.head = linear_classifier(embed_dim, num_classes)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, besides biases and norms."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters of each layer, for layer-wise learning rates."""
        return {"stem": r"^embed", "blocks": r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations inside layers in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; there is nothing to pool."""
        self.num_classes = num_classes
        self.head = linear_classifier(self.num_features, num_classes).to(self.embed.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute features (batch, embed_dim) of images (batch, channels, height, width)."""
        hidden = self.embed(images.flatten(1))
        if self.grad_checkpointing and self.training:
            return cast(Tensor, checkpoint_seq(self.blocks, hidden))
        return cast(Tensor, self.blocks(hidden))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or return the features."""
        return features if pre_logits else cast(Tensor, self.head(features))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes)."""
        return self.forward_head(self.forward_features(images))


SIZES: dict[str, dict[str, Any]] = {"gated_mlp": {}, "highway_mlp": {"kind": "highway"}}
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (1, 8, 8),
            "fixed_input_size": True,
            "num_classes": 10,
            "mean": (0.5,),
            "std": (0.5,),
            "crop_pct": 1.0,
            "first_conv": None,
            "classifier": "head",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    return build(GatedMLP, name, pretrained, **(SIZES[name] | kwargs))


register_sizes(__name__, SIZES, _create)
