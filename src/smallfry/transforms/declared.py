"""Channel groups of known blocks: MLPs, gated MLPs and attention.

A block of our own has a method ``channel_groups``, with names relative to itself. Blocks of timm
are described here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from smallfry.io.registry import add
from smallfry.transforms.groups import ChannelGroup, Slice

Describe = Callable[[Any], list[ChannelGroup]]
D = TypeVar("D", bound=Describe)

# activations that are zero at zero, so that a unit of zeros stays one
ZERO_AT_ZERO = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Hardswish),
    *(nn.ELU, nn.SELU, nn.CELU, nn.Softsign, nn.Identity),
)
_described: dict[type, Describe] = {}


def groups_of(kind: type) -> Callable[[D], D]:
    """Register the groups of a module class; decorates a function of the module.

    Raises:
        UsageError: Another function describes the class.
    """

    def register(describe: D) -> D:
        add(_described, kind, describe, "descriptions of channel groups")
        return describe

    return register


def declared_groups(model: nn.Module) -> list[ChannelGroup]:
    """Collect the groups of all known blocks in a model, each shared block once."""
    found = []
    for name, module in model.named_modules():
        own = getattr(module, "channel_groups", None)
        describe = _described.get(type(module))
        groups = own() if callable(own) else describe(module) if describe is not None else []
        found += [group.within(name) for group in groups]
    return found


def mlp_group(
    first: str, second: str, layers: nn.Module, activation: nn.Module | None
) -> ChannelGroup:
    """Build the group of hidden units between two linear layers of a block.

    Args:
        first: Name of the layer that gives them.
        second: Name of the layer that takes them.
        layers: The block.
        activation: Between the layers; None if it is zero at zero.
    """
    width = _weight(layers, first).shape[0]
    units = torch.arange(width)[:, None]
    rows = rows_of(layers, first, units)
    invariant = activation is None or isinstance(activation, ZERO_AT_ZERO)
    columns = Slice(f"{second}.weight", 1, units)
    return ChannelGroup(first, width, rows, (*rows, columns), invariant)


def gated_group(first: str, second: str, layers: nn.Module, gate_is_last: bool) -> ChannelGroup:
    """Build the group of hidden units of a gated MLP whose first layer gives values and gates.

    A value of zero is zero after any gate, so values alone are masked; both are cut.
    """
    width = _weight(layers, first).shape[0] // 2
    units = torch.arange(width)[:, None]
    values, gates = (units, units + width) if gate_is_last else (units + width, units)
    both = rows_of(layers, first, torch.cat([values, gates], dim=1))
    columns = Slice(f"{second}.weight", 1, units)
    return ChannelGroup(first, width, rows_of(layers, first, values), (*both, columns))


def attention_group(
    qkv: str, proj: str, layers: nn.Module, heads: int, counts: dict[str, int]
) -> ChannelGroup:
    """Build the group of heads of attention with a fused projection of queries, keys and values.

    A head whose values are zero gives zero for every attention pattern.
    """
    width = _weight(layers, qkv).shape[0] // 3
    inner = torch.arange(width).view(heads, width // heads)
    every = torch.cat([inner, inner + width, inner + 2 * width], dim=1)
    values = rows_of(layers, qkv, inner + 2 * width)
    taken = (*rows_of(layers, qkv, every), Slice(f"{proj}.weight", 1, inner))
    return ChannelGroup(qkv, heads, values, taken, counts=counts)


def rows_of(layers: nn.Module, name: str, entries: Tensor) -> tuple[Slice, ...]:
    """Build slices of the rows of a layer's weight, and of its bias if present."""
    bias = layers.get_submodule(name).bias
    weight = Slice(f"{name}.weight", 0, entries)
    return (weight,) if bias is None else (weight, Slice(f"{name}.bias", 0, entries))


@groups_of(Mlp)
def _mlp(block: Any) -> list[ChannelGroup]:
    if not isinstance(block.norm, nn.Identity) or not isinstance(block.fc1, nn.Linear):
        return []
    return [mlp_group("fc1", "fc2", block, block.act)]


@groups_of(Attention)
def _attention(block: Any) -> list[ChannelGroup]:
    plain = all(isinstance(norm, nn.Identity) for norm in (block.norm,))
    if not plain or getattr(block, "gate", None) is not None:
        return []
    counts = {"num_heads": 1, "attn_dim": block.head_dim}
    return [attention_group("qkv", "proj", block, block.num_heads, counts)]


def _weight(layers: nn.Module, name: str) -> Tensor:
    weight = layers.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
