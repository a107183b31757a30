"""DHVT: Dynamic Hybrid Vision Transformer (Lu et al. 2022, arXiv 2210.05958).

    tokens ← [class token; SOPE(image)]                          no positions
    x ← x + HI-MHSA(norm(x));   x ← x + DAFF(norm(x))            in each of twelve layers
    logits ← linear(norm(x)_0)

Its parts are layers of their own: ``layers.sope``, ``layers.head_interaction`` and ``layers.daff``.
"""

from collections.abc import Callable
from math import gcd
from typing import Any, cast

import torch
from timm.layers import DropPath, to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.layers.daff import DAFF
from smallfry.layers.head_interaction import HeadInteractionAttention
from smallfry.layers.sope import SOPE
from smallfry.models.sources import Source, register_sizes

SOURCE = Source("Lu et al. 2022, arXiv 2210.05958", "ArieSeirack/DHVT", "Apache-2.0")


class DHVT(nn.Module):
    """Vision transformer with convolutions in its embedding and its feed-forward layers.

    Args:
        img_size: Side of the images, or height and width, multiples of ``patch_size``; other sizes
            of the same aspect will do too, since there are no positions.
        patch_size: 2, 4 or 16.
        in_chans: Channels.
        num_classes: Classes; 0 leaves the classifier out.
        embed_dim: Features of a token.
        depth: Layers.
        num_heads: Attention heads.
        mlp_ratio: Channels of the convolutions over ``embed_dim``.
        drop_rate: Dropout after attention.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last layer, growing from 0.

    Raises:
        UsageError: Images that are no multiple of such patches.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 100,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        if height % patch_size or width % patch_size:
            raise UsageError(
                f"DHVT takes images of multiples of {patch_size} pixels, not {height}×{width}"
            )
        aspect = height // patch_size, width // patch_size
        self.num_classes, self.num_features = num_classes, embed_dim
        self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        self.aspect = aspect[0] // gcd(*aspect), aspect[1] // gcd(*aspect)
        self.patch_embed = SOPE(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    int(embed_dim * mlp_ratio),
                    drop_rate,
                    attn_drop_rate,
                    rate,
                    aspect,
                )
                for rate in rates
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = linear_classifier(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_initialize)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay.

        Positions of head tokens are decayed, as in the authors' code.
        """
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters of each layer, for layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]
        return {"stem": r"^cls_token|^patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations inside layers in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, which reads the class token whatever ``global_pool`` is."""
        self.num_classes = num_classes
        head = linear_classifier(self.num_features, num_classes)
        _initialize(head)
        self.head = head.to(self.cls_token)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute tokens (batch, 1 + rows · columns, embed_dim)."""
        rows, columns = self.aspect
        if images.shape[2] * columns != images.shape[3] * rows:
            raise ValueError(
                f"expected images of the aspect {rows}:{columns}, got "
                f"{images.shape[2]}×{images.shape[3]}"
            )
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if self.grad_checkpointing and self.training:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return cast(Tensor, self.norm(tokens))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or the class token (batch, embed_dim)."""
        return tokens[:, 0] if pre_logits else cast(Tensor, self.head(tokens[:, 0]))

    def forward(self, images: Tensor) -> Tensor:
        """Compute class logits (batch, classes)."""
        return self.forward_head(self.forward_features(images))


class Block(nn.Module):
    """Pre-norm layer of attention with head tokens and DAFF."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        drop: float,
        attn_drop: float,
        drop_path: float,
        aspect: tuple[int, int],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = HeadInteractionAttention(dim, heads, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = DAFF(dim, hidden, aspect)
        self.drop_path = DropPath(drop_path)

    def residual_branches(self) -> list[tuple[str, ...]]:
        """Return the modules of each branch, that whose output is to be zero at the end."""
        return [("norm1", "attn"), ("norm2", "mlp")]

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (batch, tokens, dim)."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return cast(Tensor, tokens + self.drop_path(self.mlp(self.norm2(tokens))))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _size(dim: int, heads: int, patch: int) -> dict[str, int]:
    return {"embed_dim": dim, "num_heads": heads, "patch_size": patch}


SIZES: dict[str, dict[str, Any]] = {
    "dhvt_tiny_cifar_patch4": _size(192, 4, 4),
    "dhvt_small_cifar_patch4": _size(384, 8, 4),
    "dhvt_tiny_cifar_patch2": _size(192, 4, 2),
    "dhvt_small_cifar_patch2": _size(384, 8, 2),
    "dhvt_tiny_imagenet_patch16": _size(192, 3, 16),
    "dhvt_small_imagenet_patch16": _size(384, 6, 16),
    "dhvt_tiny_domain_patch16": _size(192, 4, 16),
    "dhvt_small_domain_patch16": _size(384, 6, 16),
}
CLASSES = {"cifar": (32, 100), "imagenet": (224, 1000), "domain": (224, 345)}


def _cfg(name: str) -> dict[str, Any]:
    side, classes = next(size for data, size in CLASSES.items() if data in name)
    return {
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "num_classes": classes,
        "mean": (0.485, 0.456, 0.406),  # ImageNet's on CIFAR too, as in the authors' code
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 1.0 if side == 32 else 0.875,
        "first_conv": "patch_embed.proj.0.0",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in SIZES})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> DHVT:
    build = cast(Callable[..., DHVT], build_model_with_cfg)
    return build(DHVT, name, pretrained, **(SIZES[name] | kwargs))


register_sizes(__name__, SIZES, _create)
