"""Attention with head tokens, HI-MHSA of DHVT (Lu et al. 2022, arXiv 2210.05958).

t_i ← gelu(norm(W · mean over tokens of the i-th slice of x)) + p_i        head token of head i
[x; t] ← attention([x; t]);   class token ← class token + mean_i t_i;   t is dropped
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError

__all__ = ["HeadInteractionAttention"]


class HeadInteractionAttention(nn.Module):
    """Multi-head self-attention in which every head contributes a token of its own.

    Args:
        dim: Features of a token.
        heads: Attention heads, which is also the number of head tokens.
        attn_drop: Dropout of attention weights.
        drop: Dropout of the output.

    Raises:
        UsageError: Heads don't divide the features.

    Example:
        >>> import torch
        >>> from smallfry.layers.head_interaction import HeadInteractionAttention
        >>> HeadInteractionAttention(12, heads=3)(torch.zeros(2, 17, 12)).shape
        torch.Size([2, 17, 12])
    """

    def __init__(self, dim: int, heads: int, attn_drop: float = 0.0, drop: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise UsageError(f"{heads} heads don't divide {dim} features")
        self.num_heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.ht_proj = nn.Linear(dim // heads, dim)
        self.ht_norm = nn.LayerNorm(dim // heads)
        self.pos_embed = nn.Parameter(torch.empty(1, heads, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (batch, tokens, dim), the class token first."""
        batch, count, _ = tokens.shape
        rows = torch.cat([tokens, self.head_tokens(tokens)], dim=1)
        qkv = self.qkv(rows).view(batch, count + self.num_heads, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        drop = self.attn_drop if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        mixed = self.proj(attended.transpose(1, 2).flatten(2))
        first = mixed[:, :1] + mixed[:, count:].mean(dim=1, keepdim=True)
        return cast(Tensor, self.proj_drop(torch.cat([first, mixed[:, 1:count]], dim=1)))

    def head_tokens(self, tokens: Tensor) -> Tensor:
        """Compute the head tokens (batch, heads, dim) of tokens (batch, tokens, dim)."""
        batch, _, dim = tokens.shape
        heads = self.num_heads
        slices = tokens.mean(dim=1).view(batch, heads, dim // heads)
        pieces = self.ht_proj(slices).view(batch, heads, heads, dim // heads)
        return F.gelu(self.ht_norm(pieces)).flatten(2) + self.pos_embed
