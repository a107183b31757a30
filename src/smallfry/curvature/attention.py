"""PyTorch's multi-head attention, decomposed into separate layer calls.

``nn.MultiheadAttention`` multiplies with its weights inside one function. While curvature is taken,
its forward is spelled out: queries, keys and values are projected by a linear layer that shares its
weight, what lies between is PyTorch's own function with identities for weights, and ``out_proj`` is
called. Products with an identity are exact.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from smallfry.curvature.spelled import Host, Part


def can_spell_out(module: nn.Module) -> bool:
    """Return whether a module is PyTorch's own attention with one packed weight."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in module.__dict__
        and module._parameters.get("in_proj_weight") is not None
        and "weight" in module.out_proj._parameters
        and type(module.out_proj).forward is nn.Linear.forward  # which attention never calls
        and "forward" not in module.out_proj.__dict__
    )


def host_of_attention(attention: nn.MultiheadAttention) -> Host:
    """Wrap an attention with one packed weight as a host of two projections."""
    projection = Part(attention.in_proj_weight, attention.in_proj_bias)
    return Host(attention, {"in_proj": projection}, _spelled_out(attention, projection))


def _spelled_out(attention: nn.MultiheadAttention, projection: Part) -> Callable[..., Any]:
    """Build a forward that calls an attention's projections as layers."""

    def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        size, found = attention.embed_dim, dict[int, Tensor]()
        parts = []
        for number, x in enumerate((query, key, value)):
            if id(x) not in found:
                found[id(x)] = projection(x)
            parts.append(found[id(x)][..., number * size : (number + 1) * size])
        own = vars(attention) | {
            **dict.fromkeys(("bias_k", "bias_v"), None),
            **attention._parameters,
            **dict.fromkeys(("in_proj_weight", "in_proj_bias"), None),
        }
        same = torch.eye(size, dtype=parts[0].dtype, device=parts[0].device)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        own |= dict.fromkeys(names, same) | {"_qkv_same_embed_dim": False}
        own["out_proj"] = SimpleNamespace(weight=same, bias=None)
        inner: Any = SimpleNamespace(**own)
        run: Any = nn.MultiheadAttention.forward
        output, weights = run(inner, *parts, *rest, **named)
        projected = attention.out_proj(output)
        if attention.batch_first and projected.ndim == 3:
            # in memory as PyTorch's own, for a dropout behind it draws in that order
            projected = projected.transpose(0, 1).contiguous().transpose(0, 1)
        return projected, weights

    return forward
