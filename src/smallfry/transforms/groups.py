"""Channel groups: sets of tensor slices to cut together.

A group has a number of interchangeable channels: hidden units of an MLP, heads of attention,
channels of convolutions that are added. Cutting one removes entries of several tensors. Blocks of
known kinds declare their groups (``declared``), and those of other layers are traced (``traced``);
``find.find_groups`` has both, verified.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smallfry.errors import UsageError, nearest
from smallfry.transforms.resize import (
    Resize,
    apply_counts,
    feature_widths,
    fit_attributes,
    fit_features,
    index_select,
    set_tensor,
    tensors_of,
)


class Slice(NamedTuple):
    """Entries of a tensor for the channels of a group."""

    tensor: str  # qualified name of a parameter or buffer
    dim: int
    entries: Tensor  # (channels, entries per channel), positions in that dimension, int64


@dataclass(frozen=True)
class ChannelGroup:
    """Channels to cut together.

    Args:
        name: Qualified name of the layer that gives the channels.
        channels: Their number.
        zeroed: Entries that are zero in a channel that is masked.
        cut: Entries that a cut channel does not have any more; those of ``zeroed`` among them.
        zero_invariant: True if removing an all-zero channel changes no output.
        counts: Share of counting attributes per channel, such as
            ``{"blocks.0.attn.heads": 1}``.
        divisor: Survivors are a multiple of it, where the hardware needs that.
    """

    name: str
    channels: int
    zeroed: tuple[Slice, ...]
    cut: tuple[Slice, ...]
    zero_invariant: bool = True
    counts: Mapping[str, int] = field(default_factory=dict)
    divisor: int = 1

    def within(self, prefix: str) -> "ChannelGroup":
        """Prefix a block's group with the block's name in its model."""
        if not prefix:
            return self
        zeroed, cut = (
            tuple(each._replace(tensor=f"{prefix}.{each.tensor}") for each in slices)
            for slices in (self.zeroed, self.cut)
        )
        counts = {f"{prefix}.{name}": count for name, count in self.counts.items()}
        return replace(self, name=f"{prefix}.{self.name}", zeroed=zeroed, cut=cut, counts=counts)


def mask(model: nn.Module, group: ChannelGroup, channels: Tensor) -> None:
    """Zero channels of a group, in place.

    Args:
        model: The model.
        group: One of its groups.
        channels: Their numbers, int64.
    """
    tensors = tensors_of(model)
    with torch.no_grad():
        for each in group.zeroed:
            tensor = tensors[each.tensor]
            tensor.index_fill_(
                each.dim, each.entries[channels.cpu()].flatten().to(tensor.device), 0
            )


def cut(model: nn.Module, groups: Sequence[ChannelGroup], keep: Mapping[str, Tensor]) -> Resize:
    """Keep only some channels, in place.

    Args:
        model: The model; optimizers of its parameters are to be made anew.
        groups: Groups of the model.
        keep: Numbers of the channels that stay, int64, by a group's name.

    Returns:
        The transform that gives the architecture the new shapes.

    Raises:
        UsageError: A name that is none of the groups', or no channel left.
    """
    by_name = {group.name: group for group in groups}
    removed: dict[tuple[str, int], list[Tensor]] = {}
    counts: dict[str, int] = {}
    for name, kept in keep.items():
        if name not in by_name:
            raise UsageError(f"unknown group of channels '{name}'{nearest(name, by_name)}")
        group = by_name[name]
        gone = torch.ones(group.channels, dtype=torch.bool)
        gone[kept.cpu()] = False
        if bool(gone.all()):
            raise UsageError(f"'{name}' would have no channel left; keep at least one")
        for each in group.cut:
            removed.setdefault((each.tensor, each.dim), []).append(each.entries[gone].flatten())
        for attribute, each_count in group.counts.items():
            owner, _, leaf = attribute.rpartition(".")
            now = counts.get(attribute, getattr(model.get_submodule(owner), leaf))
            counts[attribute] = now - each_count * int(gone.sum())
    widths = feature_widths(model)
    shapes = _cut_tensors(model, removed)
    apply_counts(model, counts)
    fit_attributes(model, shapes)
    fit_features(model, widths)
    return Resize(shapes, counts)


def _cut_tensors(
    model: nn.Module, removed: Mapping[tuple[str, int], list[Tensor]]
) -> dict[str, list[int]]:
    tensors, shapes = tensors_of(model), {}
    for (name, dim), entries in removed.items():
        kept = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
        kept[torch.cat(entries)] = False
        tensors[name] = index_select(tensors[name], dim, kept.nonzero().flatten())
        shapes[name] = list(tensors[name].shape)
    for name in shapes:
        set_tensor(model, name, tensors[name])
    return shapes
