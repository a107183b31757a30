"""CCT: Compact Convolutional Transformers (Hassani et al. 2021, arXiv 2104.05704).

    tokens ← maxpool(relu(conv(image))), once or twice, + positions
    s ← s + attention(norm(s));   s ← norm(s);   s ← s + mlp(s)      in each layer
    logits ← linear(Σ_t softmax_t(w · s_t) s_t)                       sequence pooling

The residual around the MLP goes on from the normed sum, as in the authors' code. Names and sizes
are theirs: ``cct_7_3x1_32`` has 7 layers, one 3×3 convolution, and takes 32×32 images.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import ceil, prod
from typing import Any, cast

import torch
from timm.layers import DropPath, to_2tuple
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.transforms.declared import mlp_group
from smallfry.transforms.groups import ChannelGroup

TOKENIZER_CHANNELS = 64  # between two convolutions


class CCT(nn.Module):
    """Compact convolutional transformer.

    Args:
        img_size: Side of the images, or height and width.
        in_chans: Channels.
        num_classes: Classes; 0 leaves the classifier out.
        embed_dim: Features of a token.
        depth: Layers.
        num_heads: Attention heads.
        mlp_ratio: Hidden features over ``embed_dim``.
        convolutions: Convolutions of the tokenizer; each halves the side.
        drop_rate: Dropout in the MLP, and before the classifier.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last layer, growing from 0.

    Raises:
        UsageError: No token is left of the image, or heads don't divide the features.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        convolutions: int = 1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        if convolutions < 1 or min(height, width) < 2**convolutions:
            raise UsageError(
                f"{convolutions} convolutions leave no tokens of {height}×{width} images: "
                "take fewer, or larger images"
            )
        tokens = prod(ceil(pixels / 2**convolutions) for pixels in (height, width))
        if embed_dim % num_heads:
            raise UsageError(
                f"{num_heads} heads don't divide {embed_dim} features: choose another num_heads"
            )
        self.num_classes, self.num_features = num_classes, embed_dim
        self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        widths = [in_chans, *[TOKENIZER_CHANNELS] * (convolutions - 1), embed_dim]
        self.tokenizer = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
                )
                for a, b in pairwise(widths)
            )
        )
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Layer(embed_dim, num_heads, mlp_ratio, drop_rate, attn_drop_rate, rate)
                for rate in rates
            )
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.attention_pool = nn.Linear(embed_dim, 1)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.2)
        self.apply(_initialize)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay."""
        return {"pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations inside layers in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; sequence pooling stays whatever ``global_pool`` is."""
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        _initialize(head)
        self.head = head.to(self.pos_embed)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute tokens (batch, tokens, embed_dim) of images (batch, channels, side, side)."""
        tokens = self.tokenizer(images).flatten(2).transpose(1, 2) + self.pos_embed
        if self.grad_checkpointing and self.training:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        normed: Tensor = self.norm(tokens)
        return normed

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or pooled features (batch, embed_dim)."""
        weights = F.softmax(self.attention_pool(tokens), dim=1)
        pooled: Tensor = self.head_drop((weights.transpose(1, 2) @ tokens).squeeze(1))
        if pre_logits:
            return pooled
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Compute class logits (batch, classes)."""
        return self.forward_head(self.forward_features(images))


class Layer(nn.Module):
    """Attention and MLP, the latter with its residual from the normed sum."""

    def __init__(
        self, dim: int, heads: int, ratio: float, drop: float, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qkv_bias=False, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (batch, tokens, dim)."""
        tokens = self.norm2(tokens + self.drop_path(self.attn(self.norm1(tokens))))
        hidden = self.drop(F.gelu(self.fc1(tokens)))
        out: Tensor = tokens + self.drop_path(self.drop(self.fc2(hidden)))
        return out

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the group of its hidden units; attention has groups of its own."""
        return [mlp_group("fc1", "fc2", self, None)]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)


RENAMED = {
    "tokenizer.conv_layers": "tokenizer",
    "classifier.positional_emb": "pos_embed",
    "classifier.attention_pool": "attention_pool",
    "classifier.fc": "head",
    "classifier.norm": "norm",
    "classifier.blocks": "blocks",
    ".pre_norm": ".norm1",
    ".norm1": ".norm2",
    ".self_attn": ".attn",
    ".linear1": ".fc1",
    ".linear2": ".fc2",
}


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map weights from the authors' names to this module's."""
    if "classifier.positional_emb" not in state:
        return dict(state)
    renamed = {}
    for key, value in state.items():
        name = key
        for theirs, ours in RENAMED.items():
            if theirs in name:
                name = name.replace(theirs, ours)
                if theirs == ".pre_norm":
                    break  # or its new name would be taken for their second norm
        renamed[name] = value
    return renamed


SIZES: dict[str, dict[str, Any]] = {
    "cct_2_3x2_32": {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    "cct_4_3x2_32": {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    "cct_6_3x1_32": {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    "cct_7_3x1_32": {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    "cct_7_3x2_32": {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "num_classes": 10,
            "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's
            "std": (0.2470, 0.2435, 0.2616),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "tokenizer.0.0",
            "classifier": "head",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> CCT:
    sizes = SIZES[name] | {"convolutions": int(name[8]), "img_size": 32}
    build = cast(Callable[..., CCT], build_model_with_cfg)
    return build(
        CCT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **(sizes | kwargs)
    )


@register_model  # type: ignore[untyped-decorator]
def cct_2_3x2_32(pretrained: bool = False, **kwargs: Any) -> CCT:
    """Build CCT-2/3×2: 283,723 parameters for 10 classes."""
    return _create("cct_2_3x2_32", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def cct_4_3x2_32(pretrained: bool = False, **kwargs: Any) -> CCT:
    """Build CCT-4/3×2: 482,123 parameters for 10 classes."""
    return _create("cct_4_3x2_32", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def cct_6_3x1_32(pretrained: bool = False, **kwargs: Any) -> CCT:
    """Build CCT-6/3×1: 3,233,803 parameters for 10 classes."""
    return _create("cct_6_3x1_32", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def cct_7_3x1_32(pretrained: bool = False, **kwargs: Any) -> CCT:
    """Build CCT-7/3×1: 3,760,139 parameters for 10 classes."""
    return _create("cct_7_3x1_32", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def cct_7_3x2_32(pretrained: bool = False, **kwargs: Any) -> CCT:
    """Build CCT-7/3×2: 3,853,259 parameters for 10 classes."""
    return _create("cct_7_3x2_32", pretrained, kwargs)
