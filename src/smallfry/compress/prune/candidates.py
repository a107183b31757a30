"""Erasable branches of a model, each with the transforms of its exact erasure."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smallfry.compress.prune.graphs import (
    Segment,
    find_segments,
    has_parameters,
    is_connected,
    zero_segments,
)
from smallfry.compress.prune.regions import trace
from smallfry.errors import UsageError
from smallfry.transforms.declared import declared_groups
from smallfry.transforms.erased import Erase, without_steps
from smallfry.transforms.spec import Transform

TOLERANCE = 1e-4  # between outputs zeroed and erased, relative to the largest, in float32


class Candidates:
    """Erasable branches of a model.

    Args:
        model: Left as it is.
        example: A batch of inputs.

    Attributes:
        segments: The branches by name, in order.

    Raises:
        UsageError: The model has quantized layers.

    Example:
        >>> import timm, torch, smallfry
        >>> model = timm.create_model("resnet10t", num_classes=10)
        >>> [*Candidates(model, torch.zeros(2, 3, 32, 32)).segments][:2]
        ['layer1.0.conv1', 'layer2.0.conv1']
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        if not all(each.is_floating_point() for each in model.parameters()):
            raise UsageError(
                "branches of quantized layers can't be erased: erase before the numbers are rounded"
            )
        self._graph = trace(model)
        self._connections = Connections(model, example)
        found = branches(model) if self._graph is None else find_segments(self._graph)
        drawn = self._connections.model
        every = {s.name: (s, erasing(drawn, s, example)) for s in found if s.is_added}
        self.segments = {name: s for name, (s, transform) in every.items() if transform}
        self._transforms = {name: t for name, (_, t) in every.items() if t is not None}
        self.segments = {name: s for name, s in self.segments.items() if self.hold([name])}

    def without(self, names: Sequence[str], steps: Mapping[str, int] | None = None) -> Erase:
        """Return what erases branches, with layers that nothing calls any more.

        Args:
            names: Of branches.
            steps: New numbers of the recursion's steps.
        """
        erased = [self._transforms[name] for name in names]
        shorter = without_steps(self._connections.model, steps or {})
        return Erase.all_of([*erased, Erase(skipped=self._uncalled(names)), shorter], steps)

    def hold(self, names: Sequence[str], steps: Mapping[str, int] | None = None) -> bool:
        """Return whether the model is connected without branches, and every layer that is left."""
        gone = [self.segments[name] for name in names]
        if self._graph is not None and not is_connected(self._graph, gone):
            return False
        return self._connections.hold([self.without(names, steps)])

    def _uncalled(self, names: Sequence[str]) -> list[str]:
        """Find shared layers all of whose calls are in branches."""
        if self._graph is None:
            return []
        gone = {node for name in names for node in self.segments[name].nodes}
        own = [each for name in names for each in self.segments[name].modules]
        calls: dict[str, list[str]] = {}
        for node in self._graph.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node.name)
        return [
            name
            for name, nodes in calls.items()
            if gone.issuperset(nodes)
            and has_parameters(self._graph, [name])
            and not any(f"{name}.".startswith(f"{each}.") for each in own)
        ]


def branches(model: nn.Module) -> list[Segment]:
    """Find the branches that blocks declare, of a model that can't be traced.

    A block lists the modules of each by ``residual_branches``; of other blocks, gated MLPs whose
    units are known are taken.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        listed = getattr(module, "residual_branches", None)
        for parts in listed() if callable(listed) else ():
            whole = tuple(f"{name}.{part}" if name else part for part in parts)
            found[whole[-1]] = whole
    for group in declared_groups(model):
        owner = group.name.rpartition(".")[0]
        is_listed = any(f"{owner}.".startswith(f"{each}.") for each in found)
        if owner and not group.counts and not is_listed:
            found[owner] = (owner,)
    return [Segment(modules, modules, "", True, name) for name, modules in found.items()]


def draw(model: nn.Module) -> nn.Module:
    """Copy a model with random weights, in evaluation mode.

    Those of an untrained one are alike in many layers, or zero.
    """
    drawn = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in drawn.parameters():
        inputs = max(1, parameter.numel() // len(parameter)) if parameter.ndim else 1
        values = torch.randn(parameter.shape, generator=generator) / inputs**0.5
        parameter.data.copy_(values)
    return drawn


class Connections:
    """Parameters with a part in a model's output, without some of its branches.

    Args:
        model: Copied, with random weights, since what starts at zero passes no gradient.
        example: A batch of inputs.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model, self.example = draw(model).requires_grad_(True), example
        self.used = self._used(self.model)

    def hold(self, transforms: Sequence[Transform]) -> bool:
        """Return whether all parameters that had a part, and are left, have one after erasing."""
        erased = copy.deepcopy(self.model)
        for transform in transforms:
            transform.apply(erased)
        left = {name for name, _ in erased.named_parameters()}
        return self.used & left <= self._used(erased)

    def _used(self, model: nn.Module) -> set[str]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        with torch.enable_grad():
            outputs = model(self.example)
            if not outputs.requires_grad:
                return set()
            got = torch.autograd.grad(outputs.square().sum(), parameters, allow_unused=True)
        used = zip(names, got, strict=True)
        return {name for name, each in used if each is not None and each.any()}


@torch.no_grad()
def erasing(model: nn.Module, segment: Segment, example: Tensor) -> Erase | None:
    """Return what erases a segment as if it were at zero; None if nothing does.

    Args:
        model: Left as it is.
        segment: One of its segments.
        example: A batch of inputs.
    """
    zeroed = copy.deepcopy(model).eval()
    zero_segments(zeroed, [segment])
    expected = zeroed(example)
    trains = _trains(zeroed, example)
    for transform in _ways(segment):
        erased = copy.deepcopy(model).eval()
        try:
            transform.apply(erased)
            given = erased(example)
        except Exception:  # of shapes or attributes that something else needs
            continue
        distance = (expected - given).abs().max() if expected.shape == given.shape else torch.inf
        is_equal = distance <= TOLERANCE * expected.abs().max().clamp(min=1e-6)
        if is_equal and (not trains or _trains(erased, example)):
            return transform
    return None


def _ways(segment: Segment) -> Iterator[Erase]:
    """Yield transforms that may erase a segment, those that leave the least in front."""
    last, others = segment.modules[-1], segment.modules[:-1]
    given: dict[str, Any] = {"skipped": others, "parameters": segment.parameters}
    if last.rpartition(".")[2].isdecimal():
        yield Erase(taken_out=[last], **given)
    yield Erase([last], **given)
    yield Erase([last], numbers=[last], **given)
    yield Erase([last], whole=[last], **given)


def _trains(model: nn.Module, example: Tensor) -> bool:
    """Return whether a model runs in training mode, which is another path in some layers."""
    with torch.random.fork_rng():
        try:
            model.train()(example)
        except Exception:  # of any model
            return False
    return True
