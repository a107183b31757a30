"""Segments of a network that can be erased, and their removal from its graph.

A segment is a chain of operators, each with one input and one user, that ends at a join: an
addition or a concatenation of channels. With all of its parameters at zero its output is zero.
"""

import copy
import inspect
import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from smallfry._torch import BatchNorm
from smallfry.transforms.declared import ZERO_AT_ZERO

ADDS = (operator.add, operator.iadd, torch.add)
CATS = (torch.cat, torch.concat, torch.concatenate)
AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, BatchNorm, nn.LayerNorm, nn.GroupNorm)
PASSING = (  # zero at zero, channel by channel
    *ZERO_AT_ZERO,
    *(nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
)
FUNCTIONS = (
    *(F.relu, F.gelu, F.silu, F.dropout, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d),
    *(F.leaky_relu, F.elu, F.hardswish, torch.relu, torch.tanh),
)


class _Tracer(fx.Tracer):
    """Tracer that takes attention, and norms of any make, as one operator."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, AFFINE) or is_attention(m)
        return known or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule | None:
    """Trace a network with its first input; None if its control flow depends on values."""
    given = list(inspect.signature(model.forward).parameters.values())[1:]
    others = {each.name: each.default for each in given if each.default is not each.empty}
    try:
        return fx.GraphModule(model, _Tracer().trace(model, others))
    except Exception:  # of any model, which tracing runs
        return None


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is attention with a projection of its output."""
    return isinstance(getattr(module, "proj", None), nn.Linear) and "Attention" in (
        type(module).__name__
    )


class Segment(NamedTuple):
    """Chain of operators that ends at a join."""

    nodes: tuple[str, ...]  # from the first to the last
    modules: tuple[str, ...]  # called by them
    join: str
    is_added: bool  # else it is concatenated
    main: str = ""  # the module that it is named after

    @property
    def name(self) -> str:
        """Name of its main module, by default the first, which has parameters as a rule."""
        return self.main or self.modules[0]


def find_segments(graph: fx.GraphModule) -> list[Segment]:
    """Find the segments whose output is zero if their parameters are, with parameters of their own.

    Args:
        graph: A traced network.
    """
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    found = []
    for join in graph.graph.nodes:
        operands = operands_of(join)
        for operand in operands:
            chain = _chain(operand) if operands.count(operand) == 1 else []
            modules = [str(node.target) for node in chain if node.op == "call_module"]
            if any(calls[name] > 1 for name in modules) or not _is_zero(graph, chain):
                continue
            names = tuple(node.name for node in chain)
            segment = Segment(names, tuple(modules), join.name, join.target not in CATS)
            if segment.is_added or cuts_of(graph, join, 0, 1) is not None:
                found.append(segment)
    return found


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a join; none of another node."""
    operands: Any = ()
    is_function = node.op == "call_function"
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    if is_method or (is_function and node.target in ADDS):
        operands = node.args
    elif is_function and node.target in CATS:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        operands = node.args[0] if dim == 1 else ()
    if len(operands) < 2 or not all(isinstance(each, fx.Node) for each in operands):
        return []
    return list(operands)


def _chain(last: fx.Node) -> list[fx.Node]:
    """Collect the nodes of the longest chain that ends here."""
    chain: list[fx.Node] = []
    node = last
    while (
        node.op in ("call_module", "call_function", "call_method")
        and len(node.users) == 1
        and len(node.all_input_nodes) == 1
        and not operands_of(node)
    ):
        chain.insert(0, node)
        node = node.all_input_nodes[0]
    return chain


def _is_zero(graph: fx.GraphModule, chain: Sequence[fx.Node]) -> bool:
    """Return whether a chain has parameters, and is zero if these are."""
    for node in reversed(chain):
        if _passes_zeros(graph, node):
            continue
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is None or not any(True for _ in module.parameters()):
            return False
        return isinstance(module, AFFINE) or is_attention(module)
    return False


def _passes_zeros(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, PASSING) and not any(True for _ in module.parameters())
    return node.op == "call_function" and node.target in FUNCTIONS


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
        elif _passes_zeros(graph, user):
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
    ahead = _reached([*inputs, *constants], gone, lambda n: n.users)
    behind = _reached(ends, gone, lambda n: n.all_input_nodes)
    on_path = ahead & behind
    through = _reached(inputs, gone, lambda n: n.users)
    return all(end.name in through for end in ends) and all(
        node.name in on_path for node in nodes if _has_parameters(graph, node)
    )


def _reached(starts: Sequence[fx.Node], gone: set[str], further: Any) -> set[str]:
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node.name not in found and node.name not in gone:
            found.add(node.name)
            waiting += further(node)
    return found


def _has_parameters(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return node.op == "get_attr"
    return any(True for _ in graph.get_submodule(str(node.target)).parameters())


@torch.no_grad()
def zero_segments(model: nn.Module, segments: Iterable[Segment]) -> None:
    """Set all parameters of segments to zero, in place."""
    for segment in segments:
        for name in segment.modules:
            for parameter in model.get_submodule(name).parameters():
                parameter.zero_()


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
