"""Modules that use the token grid: a tokenizer, a layer, and rotary positions.

A sequence is parts laid end to end, given by their ``sizes``. A part lies row by row on the grid
that ``Grids`` have for its number of tokens; a part of one token lies nowhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import cast

import torch
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.models.layers import EVERY, Layer, SwiGLU
from smallfry.transforms.groups import ChannelGroup, Slice

__all__ = ["ConvSwiGLU", "GridLayer", "Rotary", "conv_tokenizer"]

STRIDES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # of both convolutions, by the side of a patch
Grids = dict[int, tuple[int, int]]  # rows and columns by the number of tokens, if not a square
THETA = 100.0  # wavelengths up to 2π × so many patches


def grid_of(count: int, grids: Grids) -> tuple[int, int]:
    """Return rows and columns of a number of tokens."""
    return grids.get(count) or (isqrt(count), isqrt(count))


def conv_tokenizer(channels: int, dim: int, patch_size: int) -> nn.Sequential:
    """Build two 3×3 convolutions from images to (batch, dim, rows, columns).

    They have dim / 8 features in between:

    CCT (arXiv 2104.05704) and "Early convolutions help transformers see better" (arXiv 2106.14881).
    """
    if patch_size not in STRIDES:
        raise UsageError(
            f"tokenizer 'conv' makes patches of 1, 2 or 4 pixels, not patch_size {patch_size}; "
            "take tokenizer 'patch'"
        )
    hidden = max(1, dim // 8)
    first, second = STRIDES[patch_size]
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, stride=first, padding=1, bias=False),
        nn.GELU(),
        nn.Conv2d(hidden, dim, 3, stride=second, padding=1),
    )


class ConvSwiGLU(SwiGLU):
    """SwiGLU whose gate convolves the 3×3 tokens around: value · silu(depthwise(gate)).

    The convolutional gated linear unit of TransNeXt (arXiv 2311.17132). Each part is convolved on
    its own grid. Starts as the identity, so a fresh one equals SwiGLU.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim)
        self.depthwise = nn.Conv2d(
            hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, bias=False
        )
        nn.init.dirac_(self.depthwise.weight, groups=hidden_dim)
        self.grids: Grids = {}

    def forward(self, rows: Tensor, sizes: Sequence[int] = ()) -> Tensor:
        """Transform rows (batch, tokens, dim); ``sizes`` of the parts, default one grid."""
        value, gate = self.fc1(rows).chunk(2, dim=-1)
        parts = gate.split(list(sizes or (rows.shape[1],)), dim=1)
        gate = torch.cat([self._look_around(part) for part in parts], dim=1)
        return cast(Tensor, self.fc2(value * F.silu(gate)))

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the group of its hidden units, each with its convolution of the gate."""
        (group,) = super().channel_groups()
        kernels = Slice("depthwise.weight", 0, torch.arange(group.channels)[:, None])
        return [replace(group, cut=(*group.cut, kernels))]

    def _look_around(self, part: Tensor) -> Tensor:
        batch, count, features = part.shape
        if count == 1:
            return part
        image = part.view(batch, *grid_of(count, self.grids), features).permute(
            0, 3, 1, 2
        )  # not copied
        return cast(Tensor, self.depthwise(image).permute(0, 2, 3, 1).flatten(1, 2))


class GridLayer(Layer):
    """``Layer`` with optional layer scale (CaiT, arXiv 2103.17239) and convolution.

    Args:
        dim: Width of a token.
        heads: Attention heads.
        mlp_hidden_dim: Hidden width of the SwiGLU.
        drop: Dropout on both branches.
        attn_drop: Dropout on attention weights.
        depthwise: Take ``ConvSwiGLU``.
        layer_scale: First value of what each feature of both branches is multiplied with; 0 leaves
            that out.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_hidden_dim: int,
        drop: float,
        attn_drop: float,
        depthwise: bool = False,
        layer_scale: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, mlp_hidden_dim, drop, attn_drop)
        if depthwise:
            self.mlp = ConvSwiGLU(dim, mlp_hidden_dim)
        self.scale1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.scale2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()

    def residual_branches(self) -> list[tuple[str, ...]]:
        """Return the modules of each branch, that whose output is to be zero at the end."""
        return [("norm1", "scale1", "attn"), ("norm2", "scale2", "mlp")]

    def forward(
        self,
        rows: Tensor,
        qkv: Tensor,
        kept: slice = EVERY,
        context: Tensor | None = None,
        sizes: Sequence[int] = (),
    ) -> Tensor:
        """Run the layer like ``Layer``; ``sizes`` are those of the parts of the kept rows."""
        rows = rows[:, kept] + self.drop(self.scale1(self.attn(qkv, kept, context)))
        normed = self.norm2(rows)
        mixed = self.mlp(normed, sizes) if isinstance(self.mlp, ConvSwiGLU) else self.mlp(normed)
        return cast(Tensor, rows + self.drop(self.scale2(mixed)))


class Rotary(nn.Module):
    """2-D rotary positions: queries and keys rotated by angles that grow with row and column.

    What a query sees in a key then depends on how they lie to each other. Half of a head's pairs of
    features turn with the row, half with the column (axial, RoPE-ViT, arXiv 2403.13298). A grid of
    other sides than the patches' is stretched over them.

    Args:
        head_dim: Features of a head, a multiple of 4.
        patches: Rows and columns of patches in the image.
        grids: Rows and columns of all grids in use.
    """

    def __init__(
        self, head_dim: int, patches: tuple[int, int], grids: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise UsageError(
                f"rotary positions need heads of a multiple of 4 features, not {head_dim}: choose "
                "other embed_dim or num_heads"
            )
        self.head_dim = head_dim
        frequencies = THETA ** -(torch.arange(head_dim // 4) / (head_dim // 4))
        for grid in sorted({(1, 1), *grids}):
            along = [  # in patches
                (torch.arange(s) + 0.5) * side / s - 0.5
                for s, side in zip(grid, patches, strict=True)
            ]
            row, column = torch.meshgrid(*along, indexing="ij")
            angles = torch.stack([row, column], dim=-1).flatten(0, 1)[..., None] * frequencies
            angles = angles.flatten(1) * (grid != (1, 1))  # (tokens, head_dim / 2)
            turn = torch.stack([angles.cos(), angles.sin()])[:, :, None]
            self.register_buffer(f"turn_{grid[0] * grid[1]}", turn, persistent=False)

    def forward(self, qkv: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rotate the queries and keys of (batch, tokens, 3 dim)."""
        turns = [self.get_buffer(f"turn_{size}") for size in sizes]
        cos, sin = torch.cat(turns, dim=1)  # (tokens, 1, head_dim / 2) each
        batch, count, width = qkv.shape
        split = qkv.view(batch, count, 3, width // 3 // self.head_dim, self.head_dim)
        *pairs, value = split.unbind(2)
        turned = []
        for a, b in (heads.chunk(2, dim=-1) for heads in pairs):
            turn = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
            turned.append(turn.to(value.dtype))
        return torch.stack([*turned, value], dim=2).flatten(2)
