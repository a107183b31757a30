"""Sub-models of the leading channels, layers and steps of one model.

A sub-model has shares of the channels, heads and layers, always the first ones, and a number of
steps. ``active`` runs it inside the full weights, ``extract`` copies it into a model of its own.
The two give equal outputs.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil, prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from smallfry._torch import BatchNorm
from smallfry.errors import UsageError
from smallfry.order import Stage
from smallfry.transforms.groups import ChannelGroup, Slice, cut
from smallfry.transforms.plain_groups import parse_group
from smallfry.transforms.plain_groups import plain_group as plain_group
from smallfry.transforms.registry import register
from smallfry.transforms.resize import CONVOLUTIONS, tensors_of
from smallfry.transforms.shorten import Shorten, owner_of, steps_of
from smallfry.transforms.spec import Transform

CHILD = "submodels"  # of a model with sub-models
RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class SubModel:
    """Size of a sub-model; the default is the full model.

    Args:
        width: Share of the hidden units and channels.
        heads: Share of the heads.
        depth: Share of the layers.
        latent_steps: Latent steps; None for all.
        recursion_steps: Recursion steps; None for all.

    Example:
        >>> from smallfry.transforms.nested import SubModel
        >>> print(SubModel(width=0.5, latent_steps=1))
        width 0.5, latent_steps 1
    """

    width: float = 1.0
    heads: float = 1.0
    depth: float = 1.0
    latent_steps: int | None = None
    recursion_steps: int | None = None

    def __str__(self) -> str:
        full = SubModel()
        items = [(k, v) for k, v in asdict(self).items() if v != getattr(full, k)]
        return ", ".join(f"{k} {v:g}" for k, v in items) or "full"


@register
@dataclass(frozen=True)
class Nested:
    """Sub-models of a model: all combinations of the sizes.

    Args:
        groups: Channel groups, as ``plain_group``, with ``block``, which the number of leading
            channels is a multiple of.
        layers: Lengths of the sequences that ``depths`` shorten, by their names.
        widths: Shares of the channels of groups without heads, largest first.
        heads: Shares of the heads.
        depths: Shares of the layers.
        latent_steps: Numbers of steps, None for all.
        recursion_steps: Likewise.
    """

    kind: ClassVar[str] = "nested"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.NEST

    groups: Sequence[Mapping[str, Any]]
    layers: Mapping[str, int]
    widths: Sequence[float] = (1.0,)
    heads: Sequence[float] = (1.0,)
    depths: Sequence[float] = (1.0,)
    latent_steps: Sequence[int | None] = (None,)
    recursion_steps: Sequence[int | None] = (None,)

    def __post_init__(self) -> None:
        for name in ("widths", "heads", "depths"):
            shares = getattr(self, name)
            if not shares or shares[0] != 1 or not all(0 < share <= 1 for share in shares):
                raise ValueError(f"{name} are shares in (0, 1], the first of them 1")
        for name in ("latent_steps", "recursion_steps"):
            steps = getattr(self, name)
            whole = all(type(each) is int and each >= 1 for each in steps[1:])
            if not steps or steps[0] is not None or not whole:
                raise ValueError(f"{name} are whole numbers of 1 or more after a first None")
        axes = (self.widths, self.heads, self.depths, self.latent_steps, self.recursion_steps)
        count = prod(map(len, axes))  # before they are listed, as a file can have any number
        if count > MOST:
            raise ValueError(f"{count} sub-models are too many; at most {MOST}")

    @property
    def submodels(self) -> list[SubModel]:
        """All sub-models, the full one first."""
        axes = (self.widths, self.heads, self.depths, self.latent_steps, self.recursion_steps)
        return [SubModel(*sizes) for sizes in product(*axes)]

    def apply(self, model: nn.Module) -> None:
        """Add the description of the sub-models, with their statistics of batch norms.

        Raises:
            ValueError: The model doesn't have these groups or layers.
        """
        setattr(model, CHILD, SubModels(Nest(self), model))


MOST = 10_000


class Plan(NamedTuple):
    """Parts of a model in a sub-model."""

    layers: dict[str, int]
    steps: dict[str, int]
    counts: dict[str, int]  # counting attributes, such as heads
    kept: dict[str, int]  # channels that stay, by group
    entries: dict[str, list[tuple[int, int | Tensor]]]  # by tensor: dimension, first or these ones


class Nest:
    """Sub-models of a model, with their parts.

    Args:
        nested: Their description.
    """

    def __init__(self, nested: Nested) -> None:
        self.nested = nested
        self._plans: dict[SubModel, Plan] = {}
        self.is_active = False

    @cached_property
    def groups(self) -> list[tuple[ChannelGroup, int]]:
        """Groups with their blocks."""
        return [(parse_group(each), int(each["block"])) for each in self.nested.groups]

    def plan(self, model: nn.Module, submodel: SubModel) -> Plan:
        """Find the parts of a sub-model.

        Raises:
            ValueError: The model has other tensors than when it was nested.
            UsageError: The model has no such sub-model.
        """
        if submodel not in self._plans:
            self._plans[submodel] = self._planned(model, submodel)
        return self._plans[submodel]

    def _planned(self, model: nn.Module, submodel: SubModel) -> Plan:
        every = self.nested.submodels
        if submodel not in every:
            some = "; ".join(map(str, every[:4]))
            raise UsageError(f"no sub-model '{submodel}'; there are {len(every)}: {some}; …")
        _require_sequences(model, self.nested.layers)
        layers = {
            name: min(length, ceil(length * submodel.depth))
            for name, length in self.nested.layers.items()
        }
        steps = {
            name: value
            for name in ("latent_steps", "recursion_steps")
            if (value := getattr(submodel, name)) is not None
        }
        for name, value in steps.items():
            if value > steps_of(model, name):
                raise ValueError(f"the model has no {name} of {value} or more")
        tensors = tensors_of(model)
        gone: dict[tuple[str, int], list[Tensor]] = {}
        counts: dict[str, int] = {}
        kept: dict[str, int] = {}
        for group, block in self.groups:
            share = submodel.heads if group.counts else submodel.width
            number = min(group.channels, block * ceil(group.channels * share / block - 1e-9))
            if number == group.channels:
                continue
            kept[group.name] = number
            for each in group.cut:
                _require_entries(tensors, each)
                key = each.tensor, each.dim
                gone.setdefault(key, []).append(each.entries[number:].flatten())
            for name, count in group.counts.items():
                owner, leaf = owner_of(model, name)
                before = counts.get(name, getattr(owner, leaf))
                counts[name] = before - count * (group.channels - number)
        entries: dict[str, list[tuple[int, int | Tensor]]] = {}
        for (name, dim), parts in gone.items():
            stays = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            stays[torch.cat(parts)] = False
            positions = stays.nonzero().flatten()
            first = bool((positions == torch.arange(len(positions))).all())
            entries.setdefault(name, []).append((dim, len(positions) if first else positions))
        shorter = {n: c for n, c in layers.items() if c < self.nested.layers[n]}
        return Plan(shorter, steps, counts, kept, entries)


class SubModels(nn.Module):
    """Child of a model that describes its sub-models.

    Args:
        nest: The sub-models.
        model: Their model.

    Attributes:
        statistics_1: Means and variances of the first sub-model's batch norms, one after another;
            further ones likewise. There are none without batch norms.
    """

    def __init__(self, nest: Nest, model: nn.Module) -> None:
        super().__init__()
        self.nest = nest
        for number, submodel in enumerate(nest.nested.submodels):
            plan = nest.plan(model, submodel)
            parts = [tensor for _, _, tensor in statistics(model, plan)]
            if number and parts:
                numbers = parts[0].new_zeros(sum(map(len, parts)))
                self.register_buffer(f"statistics_{number}", numbers)

    def numbers(self, submodel: SubModel) -> Tensor | None:
        """Return the statistics of a sub-model's batch norms; None of the full model."""
        number = self.nest.nested.submodels.index(submodel)
        found: Tensor | None = getattr(self, f"statistics_{number}", None)
        return found


def nest_of(model: nn.Module) -> Nest:
    """Return a model's sub-models.

    Raises:
        UsageError: It has none.
    """
    child = getattr(model, CHILD, None)
    nest = child.nest if isinstance(child, SubModels) else vars(model).get("nest")
    if not isinstance(nest, Nest):
        raise UsageError(
            f"{type(model).__name__} has no sub-models: train it with --methods '[sorted_net]'"
        )
    return nest


@contextmanager
def active(model: nn.Module, submodel: SubModel) -> Iterator[nn.Module]:
    """Run a sub-model within the full weights; gradients arrive at these.

    Args:
        model: A model with sub-models; until the end it is the sub-model.
        submodel: One of them.

    Raises:
        UsageError: No such sub-model, or another one is active.
    """
    nest = nest_of(model)
    if nest.is_active:
        raise UsageError("a sub-model is active already; end it before the next")
    plan = nest.plan(model, submodel)
    undo: list[tuple[Any, str, Any]] = []

    def swap(place: Any, key: str, value: Any) -> None:
        undo.append((place, key, place[key]))
        place[key] = value

    nest.is_active = True
    try:
        if submodel != SubModel():
            for module, leaf, value in _statistics_of(model, submodel, plan):
                swap(module._buffers, leaf, value)
            for module in model.modules():
                count = module._buffers.get("num_batches_tracked")
                if count is not None:
                    swap(module._buffers, "num_batches_tracked", count.clone())
            _swap_tensors(model, plan, swap)
            for name, number in (*plan.counts.items(), *plan.steps.items()):
                owner, leaf = owner_of(model, name)
                swap(vars(owner), leaf, number)
            for name, number in plan.layers.items():
                owner, leaf = owner_of(model, name)
                container: Any = owner._modules[leaf]
                swap(owner._modules, leaf, container[:number])
        yield model
    finally:
        nest.is_active = False
        for place, key, value in reversed(undo):
            place[key] = value


def _swap_tensors(model: nn.Module, plan: Plan, swap: Any) -> None:
    tensors = tensors_of(model)
    sliced = {
        id(tensors[name]): _sliced(tensors[name], dims)
        for name, dims in plan.entries.items()
        if name.rpartition(".")[2] not in RUNNING
    }
    for module in [*model.modules()]:
        for tensors_here in (module._parameters, module._buffers):
            for leaf, tensor in [*tensors_here.items()]:
                if id(tensor) in sliced:
                    swap(tensors_here, leaf, sliced[id(tensor)])
                    is_grouped = isinstance(module, CONVOLUTIONS) and module.groups > 1
                    if is_grouped and leaf == "weight":  # a channel is its own group
                        swap(vars(module), "groups", len(sliced[id(tensor)]))


def _sliced(tensor: Tensor, dims: Sequence[tuple[int, int | Tensor]]) -> Tensor:
    for dim, kept in dims:
        if isinstance(kept, int):
            tensor = tensor.narrow(dim, 0, kept)
        else:
            tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor.contiguous()


def statistics(model: nn.Module, plan: Plan) -> list[tuple[nn.Module, str, Tensor]]:
    """Copy a sub-model's part of the running means and variances: module, name and values."""
    found: list[tuple[nn.Module, str, Tensor]] = []
    dropped = tuple(
        f"{name}.{leaf}."
        for name, count in plan.layers.items()
        for leaf in [*model.get_submodule(name)._modules][count:]
    )
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and not f"{name}.".startswith(dropped):
            for leaf in RUNNING:
                if (tensor := module._buffers.get(leaf)) is not None:
                    dims = plan.entries.get(f"{name}.{leaf}", [])
                    found.append((module, leaf, _sliced(tensor, dims).clone()))
    return found


def _statistics_of(
    model: nn.Module, submodel: SubModel, plan: Plan
) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the sub-model's own running statistics, or copies of the full model's in training."""
    found = statistics(model, plan)
    child = getattr(model, CHILD, None)
    own = child.numbers(submodel) if isinstance(child, SubModels) else None
    if own is None:
        return found
    parts = torch.split(own, [len(value) for *_, value in found])
    return [
        (module, leaf, part.clone()) for (module, leaf, _), part in zip(found, parts, strict=True)
    ]


def extract(model: nn.Module, submodel: SubModel) -> tuple[nn.Module, tuple[Transform, ...]]:
    """Copy a sub-model into a smaller model.

    Args:
        model: A model with sub-models; left as it is.
        submodel: One of them.

    Returns:
        The model, in the mode of the original, and the transforms that make its architecture of
        that of the model without sub-models.

    Raises:
        UsageError: No such sub-model.
    """
    nest = nest_of(model)
    plan = nest.plan(model, submodel)
    numbers = [value for *_, value in _statistics_of(model, submodel, plan)]
    small = copy.deepcopy(model)
    small._modules.pop(CHILD, None)
    transforms: list[Transform] = []
    if plan.layers or plan.steps:
        transforms.append(Shorten(plan.layers, plan.steps))
        transforms[-1].apply(small)
    names = tensors_of(small).keys()
    modules = {name for name, _ in small.named_modules(remove_duplicate=False)}
    groups = [_among(group, names, modules) for group, _ in nest.groups]
    keep = {g.name: torch.arange(plan.kept[g.name]) for g in groups if g.name in plan.kept}
    if keep:
        transforms.append(cut(small, groups, keep))
    own = [m._buffers[leaf] for m, leaf, _ in statistics(small, plan._replace(entries={}))]
    for tensor, value in zip(own, numbers, strict=True):
        assert tensor is not None
        tensor.copy_(value)
    return small, tuple(transforms)


def _among(group: ChannelGroup, names: Any, modules: set[str]) -> ChannelGroup:
    """Restrict a group to the tensors that there are."""
    counts = {n: c for n, c in group.counts.items() if n.rpartition(".")[0] in modules}
    zeroed, cut_ = (
        tuple(each for each in slices if each.tensor in names)
        for slices in (group.zeroed, group.cut)
    )
    return replace(group, zeroed=zeroed, cut=cut_, counts=counts)


def _require_sequences(model: nn.Module, lengths: Mapping[str, int]) -> None:
    for name, length in lengths.items():
        owner, leaf = owner_of(model, name)
        found = owner._modules.get(leaf)
        if not isinstance(found, nn.Sequential | nn.ModuleList) or len(found) != length:
            raise ValueError(f"the model has no sequence '{name}' of {length} layers")


def _require_entries(tensors: Mapping[str, Tensor], each: Slice) -> None:
    tensor = tensors.get(each.tensor)
    size = -1 if tensor is None or each.dim >= tensor.ndim else tensor.shape[each.dim]
    if int(each.entries.min()) < 0 or int(each.entries.max()) >= size:
        raise ValueError(
            f"the tensor '{each.tensor}' is not the one that was nested: other methods belong "
            "before sorted_net, or to an extracted sub-model"
        )
