"""Erasable segments of a network, and their removal from its graph.

A segment is the region of one operand of a join, an addition or a concatenation of channels, whose
output is zero if all of its parameters are: see ``regions``.
"""

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from smallfry.compress.prune.regions import (
    CATS,
    Regions,
    is_channelwise,
    operands_of,
    reached,
)

__all__ = [
    "Segment",
    "choose_connected",
    "erase_segments",
    "find_segments",
    "is_connected",
    "zero_segments",
]


class Segment(NamedTuple):
    """Operators behind one operand of a join alone."""

    nodes: tuple[str, ...]  # from the first to the last
    modules: tuple[str, ...]  # that have no part elsewhere, in order
    join: str
    is_added: bool  # else it is concatenated
    main: str = ""  # the module that it is named after
    parameters: tuple[str, ...] = ()  # of other modules

    @property
    def name(self) -> str:
        """Name of its main module, by default the first, which has parameters as a rule."""
        return self.main or self.modules[0]


def find_segments(graph: fx.GraphModule) -> list[Segment]:
    """Find the segments whose output is zero if their parameters are, with parameters of their own.

    Args:
        graph: A traced network.
    """
    regions, walls, found = Regions(graph), set[fx.Node](), list[Segment]()
    for join in graph.graph.nodes:
        operands = operands_of(join)
        for operand in operands:
            region = regions.find(operand, join, walls) if operands.count(operand) == 1 else None
            if region is None or not region.is_zero or not has_parameters(graph, region.modules):
                continue
            is_added = join.target not in CATS
            if is_added or cuts_of(graph, join, 0, 1) is not None:
                nodes, modules, parameters, _ = region
                segment = Segment(nodes, modules, join.name, is_added, parameters=parameters)
                found.append(segment)
                walls.add(join)
    return found


def has_parameters(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether one of the modules of these names has parameters."""
    return any(True for name in names for _ in model.get_submodule(name).parameters())


def cuts_of(
    graph: fx.GraphModule, node: fx.Node, start: int, width: int
) -> list[tuple[str, int, int]] | None:
    """List the inputs of layers that channels of a node arrive at.

    Args:
        graph: The network, with shapes at its nodes if ``start`` matters.
        node: The node.
        start: First of the channels.
        width: Number of channels.

    Returns:
        Module, first input and number of inputs of each; None if they arrive elsewhere, too.
    """
    found: list[tuple[str, int, int]] = []
    for user in node.users:
        operands = operands_of(user)
        module = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1:
            found.append((str(user.target), start, width))
        elif operands and user.target in CATS and operands.count(node) == 1:
            before = sum(_channels(o) for o in operands[: operands.index(node)])
            further = cuts_of(graph, user, start + before, width)
            if further is None:
                return None
            found += further
        elif is_channelwise(graph, user):
            further = cuts_of(graph, user, start, width)
            if further is None:
                return None
            found += further
        else:
            return None
    return found


def _channels(node: fx.Node) -> int:
    meta = node.meta.get("tensor_meta")
    return int(meta.shape[1]) if meta is not None else 0


def choose_connected(
    graph: fx.GraphModule, segments: Sequence[Segment], order: Iterable[int], number: int
) -> list[int]:
    """Accept segments in an order as long as the network stays connected.

    After each, every remaining operator with parameters lies on a path from the input to the
    output, and every join has an operand.

    Args:
        graph: The network.
        segments: Its segments.
        order: Their numbers, those to be erased first in front.
        number: How many to accept at most.
    """
    accepted: list[int] = []
    for each in order:
        if len(accepted) >= number:
            break
        if is_connected(graph, [segments[n] for n in (*accepted, each)]):
            accepted.append(each)
    return sorted(accepted)


def is_connected(graph: fx.GraphModule, erased: Collection[Segment]) -> bool:
    """Return whether a network without segments is connected, see ``choose_connected``."""
    gone = {name for segment in erased for name in segment.nodes}
    nodes = [node for node in graph.graph.nodes if node.name not in gone]
    for node in nodes:
        operands = operands_of(node)
        if operands and all(operand.name in gone for operand in operands):
            return False
    inputs = [node for node in nodes if node.op == "placeholder"]
    constants = [node for node in nodes if node.op == "get_attr"]
    ends = [node for node in nodes if node.op == "output"]
    ahead = reached([*inputs, *constants], lambda node: node.users, gone)
    on_path = ahead & reached(ends, lambda node: node.all_input_nodes, gone)
    through = reached(inputs, lambda node: node.users, gone)
    return through.issuperset(ends) and all(
        node in on_path for node in nodes if _has_parameters(graph, node)
    )


def _has_parameters(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return node.op == "get_attr"
    return has_parameters(graph, [str(node.target)])


@torch.no_grad()
def zero_segments(model: nn.Module, segments: Iterable[Segment]) -> None:
    """Set all parameters of segments to zero, in place."""
    for segment in segments:
        for name in parameters_of(model, segment):
            model.get_parameter(name).zero_()


def parameters_of(model: nn.Module, segment: Segment) -> list[str]:
    """Return the names of a segment's parameters."""
    found = [
        f"{name}.{leaf}"
        for name in segment.modules
        for leaf, _ in model.get_submodule(name).named_parameters()
    ]
    return [*found, *segment.parameters]


def erase_segments(
    graph: fx.GraphModule, segments: Sequence[Segment], example: Tensor
) -> fx.GraphModule:
    """Remove segments from a network.

    An addition loses its operand. A concatenation loses channels, and the layers after it the
    matching inputs. A join of one operand disappears.

    Args:
        graph: A traced network in evaluation mode; left as it is.
        segments: Segments that leave it connected.
        example: A batch of inputs, for the numbers of channels.

    Returns:
        The smaller network, whose outputs are those of the one with the segments at zero.
    """
    small = copy.deepcopy(graph)
    ShapeProp(small).propagate(example)
    nodes = {node.name: node for node in small.graph.nodes}
    gone = {segment.nodes[-1] for segment in segments}
    columns: dict[str, list[tuple[int, int]]] = {}
    for segment in segments:
        if not segment.is_added:
            join, last = nodes[segment.join], nodes[segment.nodes[-1]]
            operands = operands_of(join)
            start = sum(_channels(o) for o in operands[: operands.index(last)])
            for name, first, width in cuts_of(small, join, start, _channels(last)) or ():
                columns.setdefault(name, []).append((first, width))
    for name in dict.fromkeys(segment.join for segment in segments):
        join = nodes[name]
        left = [each for each in operands_of(join) if each.name not in gone]
        if len(left) == 1:
            join.replace_all_uses_with(left[0])
            small.graph.erase_node(join)
        else:
            join.args = (left, *join.args[1:])
    for name, removed in columns.items():
        _cut_inputs(small.get_submodule(name), removed)
    small.graph.eliminate_dead_code()
    small.delete_all_unused_submodules()
    small.recompile()
    return small


def _cut_inputs(layer: Any, removed: Sequence[tuple[int, int]]) -> None:
    kept = torch.ones(layer.weight.shape[1], dtype=torch.bool)
    for first, width in removed:
        kept[first : first + width] = False
    layer.weight = nn.Parameter(layer.weight.detach()[:, kept].clone())
    name = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    setattr(layer, name, int(kept.sum()))
