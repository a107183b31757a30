"""Base of methods that remove channels while a model trains: groups, budget, state and cut."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from smallfry.compress.prune.saliency import SCORES
from smallfry.compress.prune.selection import (
    Chosen,
    block_size,
    can_lose,
    fewest_within,
    lowest_blocks,
    without,
)
from smallfry.compress.select import chosen
from smallfry.costing import macs
from smallfry.errors import UsageError
from smallfry.training.method import Method, Setting
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import ChannelGroup, Slice, cut, mask
from smallfry.transforms.resize import tensors_of
from smallfry.transforms.spec import Transform

Of = Literal["channels", "macs"]


class PruneSettings(Protocol):
    """Settings that methods removing channels share."""

    @property
    def name(self) -> str:
        """Name of the method."""

    @property
    def sparsity(self) -> float:
        """Share to remove."""

    @property
    def of(self) -> Of:
        """Unit of the share."""

    @property
    def divisible(self) -> int:
        """Number that survivors are a multiple of."""

    @property
    def include(self) -> tuple[str, ...]:
        """Patterns of group names."""

    @property
    def exclude(self) -> tuple[str, ...]:
        """Patterns of groups that stay."""


def require_prunable(settings: PruneSettings) -> None:
    """Validate the shared settings.

    Raises:
        UsageError: A share outside [0, 1), an unknown unit or a divisor below 1.
    """
    name = settings.name
    if not 0 <= settings.sparsity < 1:
        raise UsageError(f"{name}.sparsity must be in [0, 1), not {settings.sparsity}")
    if settings.of not in ("channels", "macs"):
        raise UsageError(f"{name}.of must be channels or macs, not {settings.of!r}")
    if settings.divisible < 1:
        raise UsageError(f"{name}.divisible must be at least 1, not {settings.divisible}")


def require_scores(name: str, weights: tuple[float, ...], cosine_sign: int) -> None:
    """Validate the settings of the saliency.

    Raises:
        UsageError: Not five weights, all at least 0 and one above, or another sign than ±1.
    """
    if len(weights) != len(SCORES) or min(weights) < 0 or max(weights) <= 0:
        raise UsageError(f"{name}.weights are {len(SCORES)} numbers of 0 or more, not {weights}")
    if cosine_sign not in (-1, 1):
        raise UsageError(f"{name}.cosine_sign must be 1 or -1, not {cosine_sign}")


def steps_of(value: float, steps: int) -> int:
    """Convert a share of a run, up to 1, or a number of steps above 1, to steps."""
    return round(value * steps) if value <= 1 else round(value)


class ChannelMethod(Method):
    """Running method that removes channels of zero-invariant groups.

    Args:
        settings: Of the method.
    """

    def __init__(self, settings: PruneSettings) -> None:
        self._shared = settings
        self.groups: tuple[ChannelGroup, ...] = ()
        self.gone: Chosen = []  # channels at zero for good
        self.tensors: dict[str, Tensor] = {}
        self._stepped = False

    def begin(self, model: nn.Module, setting: Setting) -> None:
        """Find the groups, and require that the target can be reached.

        Raises:
            UsageError: No example, no group, or a target beyond what the groups have.
        """
        name = self._shared.name
        if not setting.example.numel():
            raise UsageError(f"{name} needs example inputs to find channels: pass two inputs")
        every = {
            group.name: group
            for group in find_groups(model, setting.example)
            if can_lose(group, self._shared.divisible)
        }
        if not every:
            raise UsageError(
                f"{name} finds no group with more than divisible {self._shared.divisible} "
                "channels; take a smaller divisible"
            )
        names = chosen(every, self._shared.include, self._shared.exclude, "group of channels")
        self.use(model, [every[each] for each in names], setting)

    def use(self, model: nn.Module, groups: Sequence[ChannelGroup], setting: Setting) -> None:
        """Start on given groups.

        Args:
            model: The model.
            groups: Zero-invariant groups, which compete.
            setting: Of the start.

        Raises:
            UsageError: A target beyond what the groups have.
        """
        self.model, self.groups = model, tuple(groups)
        self.tensors = tensors_of(model)
        self.gone = [[] for _ in groups]
        self._template: nn.Module | None = None
        if self._shared.of == "macs":
            self._template = copy.deepcopy(model).cpu().float().eval()
            self._example = setting.example[:1].cpu().float()
            self._macs: dict[tuple[int, ...], int] = {}
            self._require_reachable()

    @property
    def blocks(self) -> list[int]:
        """Block size of each group."""
        return [block_size(group, self._shared.divisible) for group in self.groups]

    @property
    def zeroed(self) -> set[str]:
        """Names of the parameters with zeroed entries."""
        return {each.tensor for group in self.groups for each in group.zeroed}

    def target(self, scores: list[Tensor]) -> int:
        """Return how many channels are to go in all, given their saliencies."""
        total = sum(group.channels for group in self.groups)
        sparsity = min(self._shared.sparsity, 0.999)
        if self._template is None:
            return int(total * sparsity)
        most = (1 - sparsity) * self.macs_without([[] for _ in self.groups])
        blocks = self.blocks

        def choose(number: int) -> Chosen:
            more = lowest_blocks(scores, self.gone, number, blocks)
            return [a + b for a, b in zip(self.gone, more, strict=True)]

        return fewest_within(choose, self.macs_without, most, total)

    def macs_without(self, gone: Chosen) -> int:
        """Count the multiply-accumulates of the model without such numbers of channels."""
        counts = tuple(map(len, gone))
        if counts not in self._macs:
            small = copy.deepcopy(self._template)
            assert small is not None
            keep = {
                group.name: torch.arange(group.channels - count)
                for group, count in zip(self.groups, counts, strict=True)
            }
            cut(small, self.groups, keep)
            self._macs[counts] = macs(small, self._example)
        return self._macs[counts]

    def _require_reachable(self) -> None:
        whole = self.macs_without([[] for _ in self.groups])
        least = self.macs_without(
            [[*range(g.channels - b)] for g, b in zip(self.groups, self.blocks, strict=True)]
        )
        possible = 1 - least / whole
        if self._shared.sparsity > possible:
            wanted = f"{self._shared.name}.sparsity {self._shared.sparsity}"
            raise UsageError(
                f"{wanted} of the macs is out of reach: the groups allow {possible:.3f}; take "
                "less, or a smaller divisible"
            )

    def finish(self, model: nn.Module) -> Transform | None:
        """Cut the channels that are gone."""
        if not any(self.gone):
            return None
        keep = {}
        for group, gone in zip(self.groups, self.gone, strict=True):
            if gone:  # of an average of weights, they are not zero yet
                mask(model, group, torch.tensor(gone))
                keep[group.name] = without(gone, group.channels)
        return cut(model, self.groups, keep)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups and the channels that are gone."""
        return {
            "groups": [_plain(group) for group in self.groups],
            "gone": [list(each) for each in self.gone],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, with its groups."""
        self.groups = tuple(map(_group, state["groups"]))
        self.gone = [list(each) for each in state["gone"]]
        for group in self.groups:
            for each in group.cut:
                if each.tensor not in self.tensors:
                    raise ValueError(f"the model has no tensor '{each.tensor}'")


def _plain(group: ChannelGroup) -> dict[str, Any]:
    content = asdict(group)
    slices = {
        key: [{"tensor": s.tensor, "dim": s.dim, "entries": s.entries} for s in getattr(group, key)]
        for key in ("zeroed", "cut")
    }
    return {**content, **slices, "counts": dict(group.counts)}


def _group(content: Mapping[str, Any]) -> ChannelGroup:
    slices = {key: tuple(Slice(**each) for each in content[key]) for key in ("zeroed", "cut")}
    return ChannelGroup(**{**content, **slices})
