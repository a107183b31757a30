"""One-shot channel pruning by weight magnitude: the baseline for finer methods.

The size of a channel is the Euclidean norm of its entries in a group, divided by the mean of its
group so that groups compare (Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710,
with norms over whole groups as in DepGraph, arXiv 2301.12900).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.compress.prune.channels import report_channels
from smallfry.compress.prune.selection import block_size
from smallfry.compress.select import chosen
from smallfry.errors import UsageError
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.find import NONE_FOUND, find_groups
from smallfry.transforms.groups import ChannelGroup, cut
from smallfry.transforms.resize import tensors_of
from smallfry.transforms.spec import Transform


@register_method
@dataclass(frozen=True)
class Magnitude:
    """One-shot pruning of whole channels by magnitude.

    Args:
        sparsity: Share of all groups' channels to remove, in [0, 1).
        include: Shell patterns of group names, which are layer names.
        exclude: Patterns of groups to keep unchanged.
        divisible: Round the remaining channels of a group, except heads, up to a multiple.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry.compress import Magnitude, apply_to_model
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> small, spec = apply_to_model(model, [Magnitude(sparsity=0.5)], example=images)
        >>> sum(p.numel() for p in small.parameters()) < 0.7 * 109_131
        True
    """

    name: ClassVar[str] = "magnitude"
    trains: ClassVar[bool] = False
    tunable: ClassVar[bool] = True

    sparsity: float = 0.5
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    divisible: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or self.divisible < 1:
            raise UsageError("magnitude.sparsity must be in [0, 1), and divisible at least 1")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Prune(self)


class _Prune(Method):
    def __init__(self, settings: Magnitude) -> None:
        self._settings = settings
        self._groups: tuple[ChannelGroup, ...] = ()
        self._report: dict[str, Any] | None = None

    def begin(self, model: nn.Module, setting: Setting) -> None:
        if not setting.example.numel():
            raise UsageError(
                "magnitude needs example inputs to find channels: pass example= with two inputs"
            )
        found = {group.name: group for group in find_groups(model, setting.example)}
        if not found:
            raise UsageError(f"{self._settings.name} {NONE_FOUND}")
        names = chosen(found, self._settings.include, self._settings.exclude, "group of channels")
        self._groups = tuple(found[name] for name in names)

    def finish(self, model: nn.Module) -> Transform:
        sizes = {group.name: channel_sizes(model, group) for group in self._groups}
        keep = survivors(self._groups, sizes, self._settings.sparsity, self._settings.divisible)
        left = [len(keep[group.name]) for group in self._groups]
        self._report = report_channels(model, self._settings.name, self._groups, left)
        return cut(model, self._groups, keep)

    def report(self) -> dict[str, Any] | None:
        return self._report


@torch.no_grad()
def channel_sizes(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Compute the norms of a group's channels relative to their mean, (channels,) in float64."""
    tensors = tensors_of(model)
    total = torch.zeros(group.channels, dtype=torch.float64)
    for each in group.cut:
        tensor = tensors[each.tensor].detach().cpu().double()
        if each.tensor.rpartition(".")[2] in ("running_mean", "running_var"):
            continue
        rows = tensor.movedim(each.dim, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
        squares = rows.square().sum(1)
        total += squares[each.entries].sum(1)
    sizes = total.sqrt()
    return sizes / sizes.mean().clamp(min=torch.finfo(sizes.dtype).tiny)


def survivors(
    groups: Sequence[ChannelGroup], sizes: Mapping[str, Tensor], sparsity: float, divisible: int
) -> dict[str, Tensor]:
    """Choose the remaining channels per group: the largest overall, at least one each.

    Args:
        groups: To choose from; all compete.
        sizes: Sizes of their channels, comparable between groups.
        sparsity: Share that goes.
        divisible: Survivors are rounded up to a multiple, in groups of more than that.
    """
    every = torch.cat([sizes[group.name] for group in groups]).sort(descending=True).values
    kept_in_all = max(1, round((1 - sparsity) * len(every)))
    threshold = every[kept_in_all - 1]
    keep = {}
    for group in groups:
        step = block_size(group, divisible)
        count = max(1, int((sizes[group.name] >= threshold).sum()))
        count = min(group.channels, step * ceil(count / step))
        order = sizes[group.name].sort(descending=True, stable=True).indices
        keep[group.name] = order[:count].sort().values
    return keep
