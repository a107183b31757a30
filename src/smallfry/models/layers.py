"""Layer of ViTRM's shared block: pre-norm, computed for the kept rows only."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.models.linear import Linear
from smallfry.transforms.declared import attention_group, gated_group
from smallfry.transforms.groups import ChannelGroup

__all__ = ["EVERY", "Attention", "Layer", "SwiGLU", "Tokens", "end_to_end"]

EVERY = slice(None)


class Tokens(NamedTuple):
    """Tokens with their cached projections in the first layer."""

    rows: Tensor  # (batch, tokens, dim)
    qkv: Tensor  # (batch, tokens, 3 dim): queries, keys and values


def end_to_end(
    parts: list[Tokens], keep: slice, context: list[Tensor | None]
) -> tuple[Tensor, Tensor, slice]:
    """Concatenate the rows and projections of parts, and locate the parts to keep."""
    there = [t.shape[:1] for t in (*(part.rows for part in parts), *context) if t is not None]
    # what is the same for all images is there once
    (batch,) = torch.broadcast_shapes(*there)  # type: ignore[no-untyped-call]
    rows, qkv = (
        torch.cat([tensor.expand(batch, -1, -1) for tensor in tensors], dim=1)
        for tensors in zip(*parts, strict=True)
    )
    sizes = [part.rows.shape[1] for part in parts]
    kept = list(range(len(parts)))[keep]  # some versions of torch.compile lack slice.indices
    return rows, qkv, slice(sum(sizes[: kept[0]]), sum(sizes[: kept[-1] + 1]))


class Layer(nn.Module):
    """Pre-norm transformer layer, without a final norm."""

    def __init__(
        self, dim: int, heads: int, mlp_hidden_dim: int, drop: float, attn_drop: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, attn_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwiGLU(dim, mlp_hidden_dim)
        self.drop = nn.Dropout(drop)

    def project(self, rows: Tensor) -> Tensor:
        """Compute queries, keys and values of normalised rows, (batch, tokens, 3 dim)."""
        return self.attn.project(self.norm1(rows))

    def residual_branches(self) -> list[tuple[str, ...]]:
        """Return the modules of each branch, that whose output is to be zero at the end."""
        return [("norm1", "attn"), ("norm2", "mlp")]

    def forward(
        self, rows: Tensor, qkv: Tensor, kept: slice = EVERY, context: Tensor | None = None
    ) -> Tensor:
        """Compute the kept rows (batch, kept, dim) of the output; all rows are attended to.

        Args:
            rows: The input, (batch, tokens, dim).
            qkv: Its ``project``.
            kept: Rows of the output to compute.
            context: ``project`` of further rows to attend to, (batch, further tokens, 3 dim).
        """
        rows = rows[:, kept] + self.drop(self.attn(qkv, kept, context))
        return cast(Tensor, rows + self.drop(self.mlp(self.norm2(rows))))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.drop = drop
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def project(self, rows: Tensor) -> Tensor:
        """Compute queries, keys and values of rows, (batch, tokens, 3 dim)."""
        return cast(Tensor, self.qkv(rows))

    def forward(self, qkv: Tensor, kept: slice = EVERY, context: Tensor | None = None) -> Tensor:
        """Attend from the kept rows to all rows and the context, (batch, kept, dim)."""
        q = self._split(qkv)[0][:, :, kept]
        _, k, v = self._split(qkv if context is None else torch.cat([context, qkv], dim=1))
        drop = self.drop if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        return cast(Tensor, self.proj(attended.transpose(1, 2).flatten(2)))

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the group of its heads."""
        return [attention_group("qkv", "proj", self, self.heads, {"heads": 1})]

    def _split(self, qkv: Tensor) -> Tensor:
        """Split into queries, keys and values, (3, batch, heads, tokens, dim / heads)."""
        batch, count, width = qkv.shape
        return qkv.view(batch, count, 3, self.heads, width // 3 // self.heads).permute(
            2, 0, 3, 1, 4
        )


class SwiGLU(nn.Module):
    """SwiGLU, value · silu(gate): fc1 gives the value first and the gate second."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, rows: Tensor) -> Tensor:
        """Transform rows (batch, tokens, dim)."""
        value, gate = self.fc1(rows).chunk(2, dim=-1)
        return cast(Tensor, self.fc2(value * F.silu(gate)))

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the group of its hidden units."""
        return [gated_group("fc1", "fc2", self, gate_is_last=True)]
