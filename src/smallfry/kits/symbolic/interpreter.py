"""Interpreter of graph programs, and the graphs that they write.

state       graph, position, port of 0 to 9, and a stack of nodes
at first    one node 0, which is the position, port 0, and an empty stack
program     a map of states; each primitive of it is executed once at most

An edge takes the same port at both ends. Nodes and edges have numbers from one counter, so that
those of a graph are 0, 1, 2, … in the order of making.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from smallfry.errors import UsageError
from smallfry.kits.symbolic.programs import Program

__all__ = ["PORTS", "Edge", "ProgramGraph", "State", "execute", "is_same", "run"]

PORTS = 10
MOST_NODES = 64


class Edge(NamedTuple):
    """Edge of a graph."""

    number: int  # in the order of nodes and edges
    one: int  # number of a node
    other: int
    port: int


@dataclass(frozen=True)
class ProgramGraph:
    """Graph with ports.

    Args:
        nodes: Numbers of the nodes, ascending.
        edges: Edges by ascending number.
    """

    nodes: tuple[int, ...] = (0,)
    edges: tuple[Edge, ...] = ()

    @cached_property
    def links(self) -> Mapping[tuple[int, int], int]:
        """Other node by node and port."""
        found = {}
        for edge in self.edges:
            found[edge.one, edge.port] = edge.other
            found[edge.other, edge.port] = edge.one
        return found

    @property
    def next_number(self) -> int:
        """Number of the next node or edge."""
        return len(self.nodes) + len(self.edges)

    @cached_property
    def neighbours(self) -> Mapping[int, frozenset[int]]:
        """Neighbours by node."""
        found: dict[int, set[int]] = {node: set() for node in self.nodes}
        for edge in self.edges:
            found[edge.one].add(edge.other)
            found[edge.other].add(edge.one)
        return {node: frozenset(near) for node, near in found.items()}

    @cached_property
    def is_connected(self) -> bool:
        """True if there is a path between all nodes."""
        seen, left = {self.nodes[0]}, [self.nodes[0]]
        while left:
            new = self.neighbours[left.pop()] - seen
            seen |= new
            left += new
        return len(seen) == len(self.nodes)

    @property
    def is_accepted(self) -> bool:
        """True for more than one node in one component."""
        return len(self.nodes) > 1 and self.is_connected

    @cached_property
    def signature(self) -> tuple[int, ...]:
        """Sorted degrees, which isomorphic graphs share."""
        return tuple(sorted(map(len, self.neighbours.values())))


class State(NamedTuple):
    """State of a program."""

    graph: ProgramGraph = ProgramGraph()
    position: int = 0
    port: int = 0
    stack: tuple[int, ...] = ()


def run(program: Program) -> ProgramGraph:
    """Execute a program from the first state, and return its graph.

    Raises:
        UsageError: It writes more than 64 nodes.

    Example:
        >>> from smallfry.kits.symbolic.programs import parse
        >>> run(parse("(push (add (connect identity)))")).edges
        (Edge(number=2, one=1, other=0, port=0),)
    """
    return execute(program, State()).graph


def execute(program: Program, state: State) -> State:
    """Execute a program on a state.

    Raises:
        UsageError: The graph gets more than 64 nodes.
    """
    while program.name in _STEPS:  # primitives of one continuation
        state = _STEPS[program.name](state)
        program = program.parts[0]
    if program.name == "func":
        inner, after = program.parts
        written = execute(inner, state).graph
        if written.is_connected:
            state = state._replace(graph=written)
        return execute(after, state)
    if program.name == "if_positions_equal":
        one, other, equal, different, after = program.parts
        same = execute(one, state).position == execute(other, state).position
        return execute(after, execute(equal if same else different, state))
    return state


def is_same(one: ProgramGraph, other: ProgramGraph) -> bool:
    """Return whether graphs are isomorphic; ports and parallel edges don't count."""
    if one.signature != other.signature:
        return False
    import networkx

    pair = [networkx.Graph((e.one, e.other) for e in each.edges) for each in (one, other)]
    return bool(networkx.is_isomorphic(*pair))


def _next_port(state: State) -> State:
    return state._replace(port=(state.port + 1) % PORTS)


def _prev_port(state: State) -> State:
    return state._replace(port=(state.port - 1) % PORTS)


def _move(state: State) -> State:
    there = state.graph.links.get((state.position, state.port), state.position)
    return state._replace(position=there)


def _add(state: State) -> State:
    graph = state.graph
    if not state.stack or not graph.is_connected:
        return state
    if len(graph.nodes) >= MOST_NODES:
        raise UsageError(f"a program writes at most {MOST_NODES} nodes: use a smaller program")
    new = graph.next_number
    return state._replace(graph=ProgramGraph((*graph.nodes, new), graph.edges), position=new)


def _push(state: State) -> State:
    return state._replace(stack=(*state.stack, state.position))


def _pop(state: State) -> State:
    rest = state.stack[:-1]
    if state.graph.is_connected or any(node != state.position for node in rest):
        return state._replace(stack=rest)
    return state


def _connect(state: State) -> State:
    graph, here, port = state.graph, state.position, state.port
    if not state.stack or (here, port) in graph.links:
        return state
    top = state.stack[-1]
    if top == here or (top, port) in graph.links:
        return state
    edge = Edge(graph.next_number, here, top, port)
    return state._replace(graph=ProgramGraph(graph.nodes, (*graph.edges, edge)))


_STEPS: Mapping[str, Callable[[State], State]] = {
    "next_port": _next_port,
    "prev_port": _prev_port,
    "move": _move,
    "add": _add,
    "push": _push,
    "pop": _pop,
    "connect": _connect,
}
