"""Regions of a traced network: the nodes behind one operand of a join alone.

A join is an addition or a concatenation. The region of an operand are all nodes whose every use
leads to it: a residual branch with its squeeze-and-excitation, its layer scale and its stochastic
depth. Modules that lie in it as a whole are its own, from the outermost one.
"""

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import fx, nn

from smallfry._torch import BatchNorm
from smallfry.transforms.declared import ZERO_AT_ZERO
from smallfry.transforms.resize import CONVOLUTIONS, TRANSPOSED

ADDS = (operator.add, operator.iadd, torch.add)
CATS = (torch.cat, torch.concat, torch.concatenate)
AFFINE = (
    *(nn.Linear, *CONVOLUTIONS, *TRANSPOSED),
    *(BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
PASSING = (  # zero at zero, channel by channel
    *ZERO_AT_ZERO,
    *(nn.Dropout, nn.Dropout2d, DropPath),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
)
CHANNELWISE = frozenset(  # functions and methods likewise, by name
    {
        *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "tanh"),
        *("dropout", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"),
    }
)
MOVING = frozenset(  # zero at zero
    {
        *("permute", "transpose", "movedim", "reshape", "view", "flatten", "unflatten", "expand"),
        *("squeeze", "unsqueeze", "contiguous", "clone", "getitem", "chunk", "split", "roll"),
        *("mean", "sum", "interpolate", "neg", "div", "truediv", "to", "type_as", "float"),
    }
)
PRODUCTS = frozenset({"mul", "mul_", "imul", "matmul", "bmm"})  # zero if one factor is


class _Tracer(fx.Tracer):
    """Tracer that takes attention, norms of any make and stochastic depth as one operator each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (*AFFINE, DropPath)) or is_attention(m)
        return known or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule | None:
    """Trace a network in evaluation mode with its first input.

    Args:
        model: Left as it is.

    Returns:
        The graph, whose modules are the network's; None if control flow depends on values.
    """
    given = list(inspect.signature(model.forward).parameters.values())[1:]
    others = {each.name: each.default for each in given if each.default is not each.empty}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return fx.GraphModule(model, _Tracer().trace(model, others))
    except Exception:  # of any model, which tracing runs
        return None
    finally:
        for module, mode in modes:
            module.training = mode


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is attention with a projection of its output."""
    return isinstance(getattr(module, "proj", None), nn.Linear) and "Attention" in (
        type(module).__name__
    )


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


class Region(NamedTuple):
    """Nodes behind one operand of a join alone."""

    nodes: tuple[str, ...]  # from the first to the operand
    modules: tuple[str, ...]  # that lie in it as a whole
    parameters: tuple[str, ...]  # of other modules, used in it alone
    is_zero: bool  # if all parameters of these are


class Regions:
    """Regions of a traced network.

    Args:
        graph: The network.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        ends = [node for node in graph.graph.nodes if node.op == "output"]
        used = reached(ends, lambda node: node.all_input_nodes)
        self._nodes = [node for node in graph.graph.nodes if node in used]
        self._users = {node: used.intersection(node.users) for node in self._nodes}
        self._within: dict[str, set[fx.Node]] = {}  # nodes of each module
        for node in self._nodes:
            for name in _modules_of(node):
                self._within.setdefault(name, set()).add(node)

    def find(self, operand: fx.Node, join: fx.Node, walls: Collection[fx.Node]) -> Region | None:
        """Find the region of an operand; None if it is of use elsewhere, too.

        Args:
            operand: Node whose region it is.
            join: Its join.
            walls: Joins that are part of no region.
        """
        if self._users.get(operand) != {join} or operand in walls or operand.op == "placeholder":
            return None
        inside = {operand}
        for node in reversed(self._nodes[: self._nodes.index(operand)]):
            is_free = node.op != "placeholder" and node not in walls
            if is_free and inside.issuperset(self._users[node]):
                inside.add(node)
        nodes = [node for node in self._nodes if node in inside]
        modules, parameters = [], []
        for node in nodes:
            whole = [name for name in _modules_of(node) if inside.issuperset(self._within[name])]
            modules += whole[:1]
            if not whole and node.op == "get_attr" and self._parameter(node) is not None:
                parameters.append(str(node.target))
        zeros: set[fx.Node] = set()
        for node in nodes:
            if self._is_zero(node, zeros, inside):
                zeros.add(node)
        names = tuple(node.name for node in nodes)
        own = tuple(dict.fromkeys(modules))
        return Region(names, own, tuple(parameters), operand in zeros)

    def _is_zero(self, node: fx.Node, zeros: set[fx.Node], inside: set[fx.Node]) -> bool:
        """Return whether a node is zero if these are, and the parameters inside."""
        if node.op == "get_attr":
            parameter = self._parameter(node)
            return parameter is not None and parameter.ndim > 0
        if node.op == "call_module" and inside.issuperset(self._within[str(node.target)]):
            module = self.graph.get_submodule(str(node.target))
            is_known = isinstance(module, AFFINE) or is_attention(module)
            if is_known and any(True for _ in module.parameters()):
                return True
        return passes_zeros(self.graph, node, zeros)

    def _parameter(self, node: fx.Node) -> nn.Parameter | None:
        owner, _, leaf = str(node.target).rpartition(".")
        found = getattr(self.graph.get_submodule(owner), leaf, None)
        return found if isinstance(found, nn.Parameter) else None


def _modules_of(node: fx.Node) -> list[str]:
    """Return the modules whose code a node belongs to, from the outermost one."""
    names = [str(name) for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return list(dict.fromkeys([*names, *([str(node.target)] if node.op == "call_module" else [])]))


def reached(
    starts: Sequence[fx.Node],
    further: Callable[[fx.Node], Iterable[fx.Node]],
    without: Collection[str] = (),
) -> set[fx.Node]:
    """Return the nodes that are reached from some, these among them.

    Args:
        starts: Where to begin.
        further: Neighbours of a node.
        without: Names of nodes that nothing passes.
    """
    found: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in found and node.name not in without:
            found.add(node)
            waiting += further(node)
    return found


def passes_zeros(graph: fx.GraphModule, node: fx.Node, zeros: Collection[fx.Node]) -> bool:
    """Return whether a node without parameters of its own is zero where these are."""
    if node.op == "call_module":
        return is_channelwise(graph, node) and node.all_input_nodes[0] in zeros
    name = name_of(node)
    if name in PRODUCTS:
        return any(each in zeros for each in node.all_input_nodes)
    return name in CHANNELWISE | MOVING and bool(node.args) and node.args[0] in zeros


def is_channelwise(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether each channel of a node is that of its input, and zero if that is."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, PASSING) and not any(True for _ in module.parameters())
    return name_of(node) in CHANNELWISE


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
