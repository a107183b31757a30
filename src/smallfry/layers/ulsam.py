"""ULSAM: attention over positions, one map for each group of channels (arXiv 2006.15102).

    a ← maxpool3×3(relu(bn(depthwise 1×1 (F))));   a ← relu(bn(conv1×1 to one channel (a)))
    F ← F + softmax over positions(a) · F                          for each group F of channels

The mean weight of a map is one over the positions, so a fresh layer is within about a percent of
the identity, and doubles what has a single position. Saini, Jha et al., WACV 2020.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError, nearest

__all__ = ["ULSAM", "insert_ulsam", "join_subspaces", "replace_with_ulsam"]


class ULSAM(nn.Module):
    """Ultra-lightweight subspace attention; all groups are computed in one call.

    timm's attention factory takes the class: ``block_args={"attn_layer": ULSAM}``.

    Args:
        channels: Channels.
        groups: Groups of channels with a map each.
        bn_momentum: Weight of a new batch in running statistics; the authors' code has 0.9.
        device: Of the weights.
        dtype: Of the weights.

    Raises:
        UsageError: Groups don't divide the channels.

    Example:
        >>> import torch
        >>> from smallfry.layers.ulsam import ULSAM
        >>> ULSAM(64, groups=4)(torch.zeros(2, 64, 7, 5)).shape
        torch.Size([2, 64, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        groups: int = 4,
        bn_momentum: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        if groups < 1 or channels % groups:
            raise UsageError(f"{groups} groups don't divide {channels} channels")
        self.groups = groups
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, **factory)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=bn_momentum, **factory)
        self.conv_point = nn.Conv2d(channels, groups, 1, groups=groups, **factory)
        self.bn_point = nn.BatchNorm2d(groups, momentum=bn_momentum, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (batch, channels, height, width)."""
        scores = F.max_pool2d(F.relu(self.bn_dws(self.conv_dws(x))), 3, stride=1, padding=1)
        scores = F.relu(self.bn_point(self.conv_point(scores)))
        maps = scores.flatten(2).softmax(dim=-1).view_as(scores)
        each = x.shape[1] // self.groups
        return x + x * maps.repeat_interleave(each, dim=1)


def join_subspaces(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map weights of ``subspaces.0``, ``subspaces.1``, … to those of a layer of all groups."""
    pattern = re.compile(r"(.*?)subspaces\.(\d+)\.(.*)")
    parts: dict[str, dict[int, Tensor]] = {}
    joined = {}
    for name, weight in state.items():
        match = pattern.fullmatch(name)
        if match is None:
            joined[name] = weight
        else:
            parts.setdefault(match[1] + match[3], {})[int(match[2])] = weight
    for name, groups in parts.items():
        values = [groups[number] for number in sorted(groups)]
        joined[name] = values[0] if values[0].ndim == 0 else torch.cat(values)
    return joined


def insert_ulsam(
    model: nn.Module,
    after: Sequence[str],
    groups: int = 4,
    bn_momentum: float = 0.1,
    example: Tensor | None = None,
) -> None:
    """Insert ULSAM after modules of a network, in place.

    A module becomes an ``nn.Sequential`` of itself and the layer.

    Args:
        model: The network.
        after: Names of modules with maps (batch, channels, height, width) as output.
        groups: See ``ULSAM``.
        bn_momentum: See ``ULSAM``.
        example: An input; default zeros of the size in timm's ``default_cfg``.

    Raises:
        UsageError: Unknown modules, or outputs that are no maps.
    """
    shapes = _shapes(model, after, example)
    for name in after:
        layer = ULSAM(shapes[name][1][1], groups, bn_momentum)
        old = model.get_submodule(name)
        _set(model, name, nn.Sequential(old, _like(layer, model)))


def replace_with_ulsam(
    model: nn.Module,
    blocks: Sequence[str],
    groups: int = 4,
    bn_momentum: float = 0.1,
    example: Tensor | None = None,
) -> None:
    """Replace blocks of a network by ULSAM, in place, which saves the arithmetic of the blocks.

    Args:
        model: The network.
        blocks: Names of modules that keep the shape of their input.
        groups: See ``ULSAM``.
        bn_momentum: See ``ULSAM``.
        example: An input; default zeros of the size in timm's ``default_cfg``.

    Raises:
        UsageError: Unknown modules, or ones that change the shape.
    """
    shapes = _shapes(model, blocks, example)
    for name in blocks:
        before, after = shapes[name]
        if before != after:
            raise UsageError(
                f"{name} maps {tuple(before)} to {tuple(after)}: ULSAM replaces modules that keep "
                "the shape; insert_ulsam adds it after any"
            )
    for name in blocks:
        _set(model, name, _like(ULSAM(shapes[name][1][1], groups, bn_momentum), model))


def _shapes(
    model: nn.Module, names: Sequence[str], example: Tensor | None
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Find the shapes of modules' first inputs and outputs, without computing anything."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            raise UsageError(f"no module '{name}' in the network{nearest(name, known)}")
    if not names:
        return {}
    if example is None:
        config: Any = getattr(model, "default_cfg", None)
        if not config:
            raise UsageError("the network has no default_cfg with its input size: give an example")
        example = torch.empty(2, *config["input_size"])
    found: dict[str, tuple[torch.Size, torch.Size]] = {}
    copy = deepcopy(model).to("meta").eval()
    for name in names:
        copy.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: found.update({name: (given[0].shape, out.shape)})
        )
    with torch.no_grad():
        copy(example.to("meta", next(model.parameters()).dtype))
    for name in names:
        if name not in found or len(found[name][1]) != 4:
            raise UsageError(f"{name} gives no map (batch, channels, height, width)")
    return found


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _like(layer: nn.Module, model: nn.Module) -> nn.Module:
    weight = next(model.parameters())
    return layer.to(weight.device, weight.dtype).train(model.training)
