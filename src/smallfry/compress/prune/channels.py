"""Base of methods for removing channels during training: groups, budget, state and cut."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from smallfry.compress.prune.budget import (
    Budget,
    LatencyBudget,
    LatencyTable,
    MacsBudget,
    prices,
)
from smallfry.compress.prune.saliency import SCORES
from smallfry.compress.prune.selection import (
    Chosen,
    block_size,
    can_lose,
    fewest_within,
    give_back,
    lowest_blocks,
    without,
)
from smallfry.compress.select import chosen
from smallfry.errors import UsageError
from smallfry.training.method import Method, Setting
from smallfry.transforms.find import NONE_FOUND, find_groups, recurrent_layers
from smallfry.transforms.groups import ChannelGroup, Slice, cut, mask
from smallfry.transforms.resize import tensors_of
from smallfry.transforms.spec import Transform

Of = Literal["channels", "macs", "ms"]


class PruneSettings(Protocol):
    """Common settings of methods for removing channels."""

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
    def table(self) -> str | None:
        """File of measured latencies, of a share of them."""

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
    if settings.of not in ("channels", "macs", "ms"):
        raise UsageError(f"{name}.of must be channels, macs or ms, not {settings.of!r}")
    if (settings.table is None) == (settings.of == "ms"):
        raise UsageError(f"{name}.of ms goes with table, a file of measured latencies")
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
    """Running method for removing channels of zero-invariant groups.

    Args:
        settings: Of the method.
    """

    removes = "channels"

    def __init__(self, settings: PruneSettings) -> None:
        self._shared = settings
        self.groups: tuple[ChannelGroup, ...] = ()
        self.gone: Chosen = []  # channels at zero for good
        self.tensors: dict[str, Tensor] = {}
        self._stepped = False
        self._report: dict[str, Any] | None = None

    def begin(self, model: nn.Module, setting: Setting) -> None:
        """Find the groups, and require that the target can be reached.

        Raises:
            UsageError: No example, no group, or a target beyond what the groups have.
        """
        name = self._shared.name
        if not setting.example.numel():
            raise UsageError(f"{name} needs example inputs to find channels: pass two inputs")
        groups = find_groups(model, setting.example)
        if not groups:
            raise UsageError(f"{name} {NONE_FOUND}")
        every = {group.name: group for group in groups if can_lose(group, self._shared.divisible)}
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
        self._example = setting.example
        self.tensors = tensors_of(model)
        self.gone = [[] for _ in groups]
        self.budget: Budget | None = None
        self._latencies: LatencyTable | None = None
        if self._shared.of == "macs":
            self.budget = MacsBudget(model, setting.example, groups)
        elif self._shared.table is not None:
            self._latencies = LatencyTable.read(self._shared.table)
            self.budget = LatencyBudget(self._latencies, groups)
        self._require_reachable()

    @property
    def blocks(self) -> list[int]:
        """Block size of each group."""
        return [block_size(group, self._shared.divisible) for group in self.groups]

    @property
    def scored(self) -> list[ChannelGroup]:
        """Groups with the entries that saliency is computed from.

        These are the zeroed ones. Of a group whose zeroed weights are all frozen, they are the
        weights that are applied to its channels: their gradient times their value is the effect of
        the channel, too.
        """
        found = []
        for group in self.groups:
            slices = [each for each in group.zeroed if self.tensors[each.tensor].requires_grad]
            if not slices:
                slices = [each for each in group.cut if self.tensors[each.tensor].requires_grad]
            found.append(replace(group, zeroed=tuple(slices)) if slices else group)
        return found

    @property
    def moved(self) -> set[str]:
        """Names of the parameters that saliency is computed from."""
        return {each.tensor for group in self.scored for each in group.zeroed}

    @property
    def zeroed(self) -> set[str]:
        """Names of the parameters with zeroed entries."""
        return {each.tensor for group in self.groups for each in group.zeroed}

    def priced(self, scores: list[Tensor]) -> list[Tensor]:
        """Divide saliencies by what a channel saves, where the target is a cost."""
        if self.budget is None:
            return scores
        sizes = [group.channels for group in self.groups]
        each_saves = prices(self.budget, list(map(len, self.gone)), self.blocks, sizes)
        return [score / price for score, price in zip(scores, each_saves, strict=True)]

    def target(self, scores: list[Tensor]) -> int:
        """Return how many channels are to go in all, given their saliencies as ``priced``."""
        total = sum(group.channels for group in self.groups)
        if self.budget is None:
            return int(total * min(self._shared.sparsity, 0.999))

        def choose(number: int) -> Chosen:
            more = lowest_blocks(scores, self.gone, number, self.blocks)
            return [a + b for a, b in zip(self.gone, more, strict=True)]

        return fewest_within(choose, self.cost_without, self._most, total)

    def choose_rest(self, scores: list[Tensor]) -> Chosen:
        """Choose all further channels up to the target, so that survivors are multiples.

        Blocks are larger than what is left to save: the most salient of those chosen stay after
        all, where the target is met without them.
        """
        chosen = lowest_blocks(scores, self.gone, self.target(scores), self.blocks)
        if self.budget is None:
            return chosen

        def fits(trial: Chosen) -> bool:
            return self.cost_without([a + b for a, b in zip(self.gone, trial, strict=True)]) <= (
                self._most
            )

        return give_back(scores, chosen, self.blocks, fits)

    @property
    def _most(self) -> float:
        whole = self.cost_without([[] for _ in self.groups])
        return (1 - min(self._shared.sparsity, 0.999)) * whole

    def cost_without(self, gone: Chosen) -> float:
        """Return the cost of the model without such numbers of channels."""
        assert self.budget is not None
        return self.budget.without(list(map(len, gone)))

    def _require_reachable(self) -> None:
        if self.budget is None:
            return
        whole = self.cost_without([[] for _ in self.groups])
        least = self.cost_without(
            [[*range(g.channels - b)] for g, b in zip(self.groups, self.blocks, strict=True)]
        )
        possible = 1 - least / whole
        if self._shared.sparsity > possible:
            wanted = f"{self._shared.name}.sparsity {self._shared.sparsity}"
            raise UsageError(
                f"{wanted} of the {self._shared.of} is out of reach: the groups allow "
                f"{possible:.3f}; take less, or a smaller divisible"
            )

    def finish(self, model: nn.Module) -> Transform | None:
        """Cut the channels that are gone."""
        left = [g.channels - len(out) for g, out in zip(self.groups, self.gone, strict=True)]
        self._report = report_channels(model, self._shared.name, self.groups, left)
        if not any(self.gone):
            return None
        keep = {}
        for group, gone in zip(self.groups, self.gone, strict=True):
            if gone:  # of an average of weights, they are not zero yet
                mask(model, group, torch.tensor(gone))
                keep[group.name] = without(gone, group.channels)
        return cut(model, self.groups, keep)

    def report(self) -> dict[str, Any] | None:
        """Return the numbers of channels that stay, after ``finish``."""
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """Return the groups and the channels that are gone."""
        return {
            "groups": [_plain(group) for group in self.groups],
            "gone": [list(each) for each in self.gone],
            "latencies": None if self._latencies is None else asdict(self._latencies),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, with its groups."""
        self.groups = tuple(map(_group, state["groups"]))
        self.gone = [list(each) for each in state["gone"]]
        if (latencies := state.get("latencies")) is not None:  # not in earlier versions' states
            self._latencies = LatencyTable(**latencies)
            self.budget = LatencyBudget(self._latencies, self.groups)
        elif self._shared.of == "macs":
            self.budget = MacsBudget(self.model, self._example, self.groups)
        for group in self.groups:
            for each in group.cut:
                if each.tensor not in self.tensors:
                    raise ValueError(f"the model has no tensor '{each.tensor}'")


def report_channels(
    model: nn.Module, method: str, groups: Sequence[ChannelGroup], left: Sequence[int]
) -> dict[str, Any]:
    """Return a method's report: the channels that stay, and layers that keep all of them.

    Args:
        model: The model.
        method: Name of the method.
        groups: Groups that it can cut.
        left: Numbers of their channels that stay.
    """
    pairs = zip(groups, left, strict=True)
    kept = [f"{group.name}: {count} of {group.channels}" for group, count in pairs]
    lists = {"channels kept": kept, "recurrent layers, kept whole": recurrent_layers(model)}
    return {"method": method, "lists": lists}


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
