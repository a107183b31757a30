"""CCT, CVT and ViT-Lite: compact transformers (Hassani et al. 2021, arXiv 2104.05704).

    tokens ← maxpool(relu(conv(image))), once or twice, + positions           CCT
    tokens ← patches of the image, + positions                                CVT, ViT-Lite
    s ← s + attention(norm(s));   s ← norm(s);   s ← s + mlp(s)               in each layer
    logits ← linear(Σ_t softmax_t(w · s_t) s_t)                               sequence pooling
    logits ← linear(s_0)                                                      ViT-Lite: class token

The residual around the MLP goes on from the normed sum, as in the authors' code. Names and sizes
are theirs: ``cct_7_3x1_32`` has 7 layers, one 3×3 convolution, and takes 32×32 images;
``cvt_7_4_32`` takes patches of 4 pixels. Theirs of ViT-Lite begin with ``vit``, as timm's do, and
are ``vit_lite_7_4_32`` here.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import isqrt
from typing import Any, Literal, cast

import torch
from timm.layers import DropPath, to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes
from smallfry.transforms.declared import mlp_group
from smallfry.transforms.groups import ChannelGroup

SOURCE = Source(
    "Hassani et al. 2021, arXiv 2104.05704", "SHI-Labs/Compact-Transformers", "Apache-2.0"
)
TOKENIZER_CHANNELS = 64  # between two convolutions
POSITIONS = ("learned", "sine", "none")


class CCT(nn.Module):
    """Compact transformer with convolutional or patch tokens.

    Args:
        img_size: Side of the images, or height and width.
        in_chans: Channels.
        num_classes: Classes; 0 leaves the classifier out.
        embed_dim: Features of a token.
        depth: Layers.
        num_heads: Attention heads.
        mlp_ratio: Hidden features over ``embed_dim``.
        convolutions: Convolutions of the tokenizer, each with a pool that halves the side.
        kernel_size: Their side; 7 has a stride of 2.
        patch_size: Side of square patches in place of these convolutions (CVT, ViT-Lite).
        positions: ``learned``, ``sine`` (fixed) or ``none``.
        class_token: Classify a class token (ViT-Lite); otherwise tokens are pooled.
        drop_rate: Dropout in the MLP, and before the classifier.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last layer, growing from 0.

    Raises:
        UsageError: No token is left of the image, heads don't divide the features, or there are no
            such positions.
    """

    pos_embed: Tensor | None
    class_token: Tensor | None

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
        kernel_size: int = 3,
        patch_size: int | None = None,
        positions: Literal["learned", "sine", "none"] = "learned",
        class_token: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise UsageError(
                f"{num_heads} heads don't divide {embed_dim} features: choose another num_heads"
            )
        if positions not in POSITIONS:
            raise UsageError(f"positions are {', '.join(POSITIONS)}, not '{positions}'")
        self.num_classes, self.num_features = num_classes, embed_dim
        self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        if patch_size is None:
            self.tokenizer = _convolutions(in_chans, embed_dim, convolutions, kernel_size)
        else:
            self.tokenizer = _patches(in_chans, embed_dim, patch_size)
        size: tuple[int, int] = to_2tuple(img_size)
        self.grid_size = _token_grid(size, convolutions, kernel_size, patch_size)
        tokens = self.grid_size[0] * self.grid_size[1] + class_token
        self.class_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        if positions == "sine":
            self.register_buffer("pos_embed", sine_positions(tokens, embed_dim), persistent=False)
        else:
            learned = torch.empty(1, tokens, embed_dim) if positions == "learned" else None
            self.register_parameter("pos_embed", None if learned is None else nn.Parameter(learned))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Layer(embed_dim, num_heads, mlp_ratio, drop_rate, attn_drop_rate, rate)
                for rate in rates
            )
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.attention_pool = None if class_token else nn.Linear(embed_dim, 1)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_classifier(embed_dim, num_classes)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.2)
        self.apply(_initialize)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay."""
        return {name for name, _ in self.named_parameters() if name in ("pos_embed", "class_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters of each layer, for layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]
        return {"stem": r"^tokenizer|^pos_embed|^class_token", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations inside layers in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; pooling stays whatever ``global_pool`` is."""
        self.num_classes = num_classes
        head = linear_classifier(self.num_features, num_classes)
        _initialize(head)
        self.head = head.to(self.norm.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute tokens (batch, tokens, embed_dim) of images (batch, channels, side, side)."""
        tokens = self.tokenizer(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        if self.grad_checkpointing and self.training:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        normed: Tensor = self.norm(tokens)
        return normed

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or pooled features (batch, embed_dim)."""
        if self.attention_pool is None:
            pooled = tokens[:, 0]
        else:
            weights = F.softmax(self.attention_pool(tokens), dim=1)
            pooled = (weights.transpose(1, 2) @ tokens).squeeze(1)
        pooled = cast(Tensor, self.head_drop(pooled))
        if pre_logits:
            return pooled
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Compute class logits (batch, classes)."""
        return self.forward_head(self.forward_features(images))


def sine_positions(tokens: int, dim: int) -> Tensor:
    """Compute sine positions, (1, tokens, dim).

    Token t and feature i have the angle t / 10000^(2⌊i/2⌋ / dim); even features are its sine, odd
    ones its cosine.
    """
    pair = torch.arange(dim) // 2
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000 ** (2 * pair.double() / dim)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos())[None].to(torch.get_default_dtype())


def _convolutions(channels: int, dim: int, count: int, kernel: int) -> nn.Sequential:
    """Build convolutions without bias, each with ReLU and a pool that halves the side."""
    if count < 1 or kernel < 1:
        raise UsageError(f"the tokenizer needs convolutions, not {count} of {kernel}×{kernel}")
    widths = [channels, *[TOKENIZER_CHANNELS] * (count - 1), dim]
    stride, padding = _stride_and_padding(kernel)
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.Conv2d(a, b, kernel, stride, padding, bias=False),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, 1),
            )
            for a, b in pairwise(widths)
        )
    )


def _patches(channels: int, dim: int, patch: int) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Conv2d(channels, dim, patch, stride=patch)))


def _token_grid(
    img_size: tuple[int, int], convolutions: int, kernel: int, patch: int | None
) -> tuple[int, int]:
    """Compute rows and columns of tokens."""
    height, width = img_size
    if patch is not None:
        grid = height // patch, width // patch
    elif min(height, width) < 2**convolutions:
        grid = 0, 0
    else:
        grid = height, width
        stride, padding = _stride_and_padding(kernel)
        for _ in range(convolutions):
            rows, columns = ((n + 2 * padding - kernel) // stride + 1 for n in grid)
            grid = (rows + 1) // 2, (columns + 1) // 2
    if min(grid) < 1:
        what = f"{convolutions} convolutions" if patch is None else f"patches of {patch} pixels"
        raise UsageError(
            f"{what} leave no tokens of {height}×{width} images: take fewer, or larger images"
        )
    return grid


def _stride_and_padding(kernel: int) -> tuple[int, int]:
    return max(1, kernel // 2 - 1), max(1, kernel // 2)


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
    "classifier.class_emb": "class_token",
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
    """Map weights from the authors' names to this module's, and positions to its image size.

    Positions of a model with sine positions, or without any, are left out: a checkpoint may have
    a frozen copy.
    """
    renamed = {}
    for key, value in state.items():
        name = key
        for theirs, ours in RENAMED.items() if "classifier.fc.weight" in state else ():
            if theirs in name:
                name = name.replace(theirs, ours)
                if theirs == ".pre_norm":
                    break  # or its new name would be taken for their second norm
        renamed[name] = value
    assert isinstance(model, CCT)
    if not isinstance(model.pos_embed, nn.Parameter):
        renamed.pop("pos_embed", None)
    elif "pos_embed" in renamed and renamed["pos_embed"].shape != model.pos_embed.shape:
        apart = int(model.class_token is not None)
        renamed["pos_embed"] = resize_positions(renamed["pos_embed"], model.grid_size, apart)
    return renamed


def resize_positions(positions: Tensor, grid: tuple[int, int], apart: int = 0) -> Tensor:
    """Resize positions (1, tokens, dim) of a square grid to another grid, bilinearly.

    Args:
        positions: Row by row.
        grid: New rows and columns.
        apart: First tokens that lie on no grid, and are kept.

    Raises:
        UsageError: The old grid is not square.
    """
    kept, old = positions[:, :apart], positions[:, apart:]
    side = isqrt(old.shape[1])
    if side**2 != old.shape[1]:
        raise UsageError(f"expected positions of a square grid, got {old.shape[1]} of them")
    image = old.view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([kept, image.flatten(2).transpose(1, 2)], dim=1)


_BODIES: dict[int, dict[str, Any]] = {  # by depth
    2: {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    4: {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    6: {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    7: {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    14: {"depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "embed_dim": 384},
}


def _cct(depth: int, kernel: int, convolutions: int) -> dict[str, Any]:
    return _BODIES[depth] | {"kernel_size": kernel, "convolutions": convolutions}


SIZES: dict[str, dict[str, Any]] = {
    "cct_2_3x2_32": _cct(2, 3, 2),
    "cct_4_3x2_32": _cct(4, 3, 2),
    "cct_6_3x1_32": _cct(6, 3, 1),
    "cct_6_3x2_32": _cct(6, 3, 2),
    "cct_7_3x1_32": _cct(7, 3, 1),
    "cct_7_3x2_32": _cct(7, 3, 2),
    "cct_7_7x2_224": _cct(7, 7, 2),
    "cct_14_7x2_224": _cct(14, 7, 2),
    "cct_14_7x2_384": _cct(14, 7, 2),
}
SIZES |= {f"cvt_{depth}_4_32": _BODIES[depth] | {"patch_size": 4} for depth in (2, 4, 6, 7)}
SIZES |= {
    f"vit_lite_{depth}_4_32": _BODIES[depth] | {"patch_size": 4, "class_token": True}
    for depth in (2, 4, 6, 7)
}
SIZES |= {
    f"{name}_sine": SIZES[name] | {"positions": "sine"}
    for name in ("cct_7_3x1_32", "cct_7_7x2_224", "cvt_7_4_32", "vit_lite_7_4_32")
}


def _cfg(name: str) -> dict[str, Any]:
    side = int(name.removesuffix("_sine").rpartition("_")[2])
    cfg = {
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "num_classes": 10,
        "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's
        "std": (0.2470, 0.2435, 0.2616),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "tokenizer.0.0",
        "classifier": "head",
    }
    if side == 32:
        return cfg
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    classes = 102 if name.startswith("cct_7") else 1000  # Flowers-102
    return cfg | imagenet | {"num_classes": classes, "crop_pct": 0.9 if side == 224 else 1.0}


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in SIZES})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> CCT:
    build = cast(Callable[..., CCT], build_model_with_cfg)
    settings = SIZES[name] | kwargs
    return build(CCT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **settings)


register_sizes(__name__, SIZES, _create)
