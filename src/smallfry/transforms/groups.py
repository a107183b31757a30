"""Channel groups: what of a model can be cut together.

A group has a number of interchangeable channels: hidden units of an MLP, heads of attention,
channels of convolutions that are added. Cutting one removes entries of several tensors. Blocks of
known kinds declare their groups (``declared``); Torch-Pruning's dependency graph finds those of
other convolutions and linear layers (``traced``). Every group is verified on an example: the model
with a channel cut gives the outputs of the model with the channel set to zero.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smallfry.errors import SmallfryWarning, UsageError, nearest
from smallfry.transforms.resize import (
    Resize,
    apply_counts,
    classifier_width,
    fit_attributes,
    fit_classifier,
    index_select,
    set_tensor,
    tensors_of,
)

TOLERANCE = 1e-4  # between outputs masked and cut, relative to the largest, in float32
OUTPUTS = "its channels are the outputs"


class Slice(NamedTuple):
    """Entries of a tensor that belong to the channels of a group."""

    tensor: str  # qualified name of a parameter or buffer
    dim: int
    entries: Tensor  # (channels, entries per channel), positions in that dimension, int64


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are cut together.

    Args:
        name: Qualified name of the layer that gives the channels.
        channels: Their number.
        zeroed: Entries that are zero in a channel that is masked.
        cut: Entries that a cut channel does not have any more; those of ``zeroed`` among them.
        zero_invariant: Whether a channel that is zero changes no output by being cut.
        counts: How much of counting attributes belongs to a channel, such as
            ``{"blocks.0.attn.heads": 1}``.
        divisor: Survivors are a multiple of it, where hardware wants that.
    """

    name: str
    channels: int
    zeroed: tuple[Slice, ...]
    cut: tuple[Slice, ...]
    zero_invariant: bool = True
    counts: Mapping[str, int] = field(default_factory=dict)
    divisor: int = 1

    def within(self, prefix: str) -> "ChannelGroup":
        """The group of a block, with names as in the model that holds it."""
        if not prefix:
            return self
        zeroed, cut = (
            tuple(each._replace(tensor=f"{prefix}.{each.tensor}") for each in slices)
            for slices in (self.zeroed, self.cut)
        )
        counts = {f"{prefix}.{name}": count for name, count in self.counts.items()}
        return replace(self, name=f"{prefix}.{self.name}", zeroed=zeroed, cut=cut, counts=counts)


def find_groups(model: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    """Find and verify a model's channel groups.

    Args:
        model: Left as it is.
        example: A batch of inputs, such as two images.

    Returns:
        The groups that hold; a warning names those that do not.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry.transforms.groups import find_groups
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> [(g.name, g.channels) for g in find_groups(model, torch.zeros(2, 1, 8, 8))][:2]
        [('blocks.0.attn.qkv', 4), ('blocks.0.mlp.fc1', 96)]
    """
    from smallfry.transforms.declared import declared_groups
    from smallfry.transforms.traced import traced_groups

    found = declared_groups(model)
    taken = {(each.tensor, each.dim) for group in found for each in group.cut}
    others = [
        group
        for group in traced_groups(model, example, skip={g.name for g in found})
        if not taken & {(each.tensor, each.dim) for each in group.cut}
    ]
    reasons = {group.name: _fault(model, group, example) for group in (*found, *others)}
    wrong = {name: reason for name, reason in reasons.items() if reason not in (None, OUTPUTS)}
    if wrong:
        some = "; ".join(f"{name}: {reason}" for name, reason in [*wrong.items()][:3])
        warnings.warn(
            f"{len(wrong)} groups of channels can't be cut and are left whole ({some})",
            SmallfryWarning,
            stacklevel=2,
        )
    return tuple(group for group in (*found, *others) if reasons[group.name] is None)


def mask(model: nn.Module, group: ChannelGroup, channels: Tensor) -> None:
    """Set channels of a group to zero, in place.

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
    """Cut all but some channels, in place.

    Args:
        model: The model; optimizers of its parameters are to be made anew.
        groups: Of the model.
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
            raise UsageError(f"there is no group of channels '{name}'{nearest(name, by_name)}")
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
    width = classifier_width(model)
    shapes = _cut_tensors(model, removed)
    apply_counts(model, counts)
    fit_attributes(model, shapes)
    fit_classifier(model, width)
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


@torch.no_grad()
def _fault(model: nn.Module, group: ChannelGroup, example: Tensor) -> str | None:
    """Why a group does not hold: outputs masked and cut differ; None if they are equal."""
    if group.channels < 2:
        return "it has one channel"
    channels = torch.arange(0, group.channels, 2)  # every other one, so that positions matter
    keep = torch.arange(1, group.channels, 2)
    masked, smaller = (copy.deepcopy(model).eval() for _ in range(2))
    mask(masked, group, channels)
    try:
        cut(smaller, [group], {group.name: keep})
        expected, given = (_flat(each(example)) for each in (masked, smaller))
    except Exception as error:  # whatever a model of another shape raises
        return (str(error) or type(error).__name__).splitlines()[0][:100]
    if not group.zero_invariant:
        return None if expected.shape == given.shape else OUTPUTS
    if expected.shape != given.shape:
        return OUTPUTS
    distance = float((expected - given).abs().max() / expected.abs().max().clamp(min=1e-6))
    return None if distance <= TOLERANCE else f"outputs masked and cut differ by {distance:.0e}"


def _flat(outputs: object) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    assert isinstance(outputs, list | tuple)
    return torch.cat([_flat(each) for each in outputs if each is not None])
