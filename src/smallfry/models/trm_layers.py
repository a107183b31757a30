"""Layers of TRM's shared block: post-norm without learned scales, and no biases."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.models.linear import Linear
from smallfry.transforms.declared import attention_group, gated_group
from smallfry.transforms.groups import ChannelGroup

__all__ = [
    "Attention",
    "GatedMLP",
    "Layer",
    "TokenMLP",
    "rms",
    "rotary_angles",
    "truncated_normal",
    "turn",
]

EPSILON = 1e-5  # of the norm
TRUNCATION = 0.87962566103423978  # standard deviation of a normal that is cut at two of its own


class Layer(nn.Module):
    """Post-norm layer: a mixer of tokens, then a SwiGLU over features."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, mlp

    def forward(self, rows: Tensor) -> Tensor:
        """Transform rows (batch, tokens, dim)."""
        rows = self.mixer(rows)
        return rms(rows + self.mlp(rows))


class Attention(nn.Module):
    """Multi-head self-attention without biases, with its residual and norm.

    Args:
        dim: Width of the rows.
        heads: Attention heads.
        rotary: Features of a head that rotary positions turn; 0 for no positions.
    """

    def __init__(self, dim: int, heads: int, rotary: int) -> None:
        super().__init__()
        self.qkv = Linear(dim, 3 * dim, bias=False)  # all heads' queries, then keys, then values
        self.mix = Mix(heads, rotary)
        self.proj = Linear(dim, dim, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Transform rows (batch, tokens, dim)."""
        return rms(rows + self.proj(self.mix(self.qkv(rows))))

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the group of its heads."""
        return [attention_group("qkv", "proj", self, self.mix.heads, {"mix.heads": 1})]

    def residual_branches(self) -> list[tuple[str, ...]]:
        """Return the modules of its branch, that whose output is to be zero at the end."""
        return [("qkv", "mix", "proj")]


class Mix(nn.Module):
    """Attention between projections: values weighed by queries and keys; no parameters."""

    def __init__(self, heads: int, rotary: int) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary

    def forward(self, qkv: Tensor) -> Tensor:
        """Mix queries, keys and values (batch, tokens, 3 · width) to (batch, tokens, width)."""
        batch, count, width = qkv.shape
        split = qkv.view(batch, count, 3, self.heads, width // 3 // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        if self.rotary:
            angles = rotary_angles(count, self.rotary, qkv.device)
            q, k = turn(q, angles), turn(k, angles)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TokenMLP(nn.Module):
    """SwiGLU across the sequence, with its residual and norm, which are across it too."""

    def __init__(self, tokens: int, hidden_dim: int) -> None:
        super().__init__()
        self.mlp = GatedMLP(tokens, hidden_dim)

    def forward(self, rows: Tensor) -> Tensor:
        """Transform rows (batch, tokens, dim)."""
        columns = rows.transpose(1, 2)
        return rms(columns + self.mlp(columns)).transpose(1, 2)


class GatedMLP(nn.Module):
    """SwiGLU, silu(gate) · value, without biases: fc1 gives the gate first and the value second."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden_dim, bias=False)
        self.fc2 = Linear(hidden_dim, dim, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Transform rows (..., dim)."""
        gate, value = self.fc1(rows).chunk(2, dim=-1)
        return cast(Tensor, self.fc2(F.silu(gate) * value))

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the group of its hidden units."""
        return [gated_group("fc1", "fc2", self, gate_is_last=False)]


def rms(rows: Tensor) -> Tensor:
    """Divide rows (..., dim) by their root mean square, in float32 at least."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt()).to(rows.dtype)


def rotary_angles(count: int, width: int, device: torch.device | None = None) -> Tensor:
    """Compute angles t · 10000^(-2i / width) of the positions t, (count, width / 2), float64."""
    rates = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    return torch.arange(count, dtype=torch.float64, device=device)[:, None] * rates


def turn(rows: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of features half a head apart, (..., count, width), by angles."""
    cos, sin = (table.to(rows.dtype) for table in (angles.cos(), angles.sin()))
    first, second = rows.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.no_grad()
def truncated_normal(tensor: Tensor, std: float) -> None:
    """Fill with a normal that is cut at twice its width and has ``std`` after the cut."""
    width = std / TRUNCATION
    nn.init.trunc_normal_(tensor, std=width, a=-2 * width, b=2 * width)
