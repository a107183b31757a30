"""Unique pairs of node and relation of a graph: the plan that layers compute messages by.

A message W_τ x_s depends on its edge only through the source s and the relation τ, so it is needed
once for each unique pair (compact materialisation; Wu et al., ASPLOS 2024, arXiv 2301.06284).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.errors import UsageError

__all__ = [
    "EXECUTIONS",
    "AnyPlan",
    "MessageCounts",
    "Pattern",
    "Plan",
    "Rows",
    "StaticPlan",
    "plan",
]

EXECUTIONS = ("edges", "compact", "aggregate", "nodes", "auto")


class MessageCounts(NamedTuple):
    """Sizes of a graph that decide what its messages cost.

    Example:
        >>> counts = MessageCounts(9, source_pairs=4, destination_pairs=6, nodes=3, relations=2)
        >>> counts.best(), counts.rows("compact")
        ('compact', 4)
    """

    edges: int
    source_pairs: int  # unique (source, relation)
    destination_pairs: int  # unique (destination, relation)
    nodes: int  # sources
    relations: int

    def rows(self, execution: str) -> int:
        """Return the rows of messages, or of sums before the product, that a layer computes."""
        return {
            "edges": self.edges,
            "compact": self.source_pairs,
            "aggregate": self.destination_pairs,
            "nodes": self.nodes * self.relations,
        }[execution]

    def best(self) -> str:
        """Return the execution of the fewest multiplications: compact or aggregate."""
        return "compact" if self.source_pairs <= self.destination_pairs else "aggregate"


class Rows(NamedTuple):
    """Rows of a typed product, in the order of relations.

    Args:
        nodes: Node of each row; None of all nodes with every relation.
        ends: End of each relation's rows.
        of_edge: Row of each edge.
        total: Rows.
    """

    nodes: Tensor | None
    ends: Sequence[int]
    of_edge: Tensor
    total: int


class Pattern:
    """Sparse matrix of edges: an entry for each edge, of its row and its column.

    Args:
        row: (edges,).
        column: (edges,).
        shape: Rows and columns.
        is_static: Compute by plain operations of fixed shapes.
    """

    def __init__(
        self, row: Tensor, column: Tensor, shape: tuple[int, int], is_static: bool = False
    ) -> None:
        self.row, self.column, self.shape, self.is_static = row, column, shape, is_static

    @cached_property
    def by_row(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Order of the entries by row (None if they are), starts of the rows, and columns."""
        return _compressed(self.row, self.column, self.shape[0])

    @cached_property
    def by_column(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Order of the entries by column, starts of the columns, and rows."""
        return _compressed(self.column, self.row, self.shape[1])


def _compressed(key: Tensor, other: Tensor, size: int) -> tuple[Tensor | None, Tensor, Tensor]:
    order = None
    if len(key) > 1 and bool((key[1:] < key[:-1]).any()):
        key, order = torch.sort(key, stable=True)
        other = other[order]
    starts = torch.searchsorted(key, torch.arange(size + 1, device=key.device))
    return order, starts, other


class StaticPlan:
    """Plan of fixed shapes, for graphs that a tracer follows: every node with every relation.

    Args:
        edge_index: Sources and destinations, (2, edges).
        edge_type: Relation of each edge, (edges,).
        nodes: Sources and destinations.
        relations: Relations.
        present: Edges that are there, (edges,), bool; None of all.
    """

    is_static = True

    def __init__(
        self,
        edge_index: Tensor,
        edge_type: Tensor,
        nodes: tuple[int, int],
        relations: int,
        present: Tensor | None = None,
    ) -> None:
        self.source, self.destination = edge_index[0], edge_index[1]
        self.type, self.nodes, self.relations = edge_type, nodes, relations
        self.present = present

    def rows(self, kind: str) -> Rows:
        """Return all pairs of a node with a relation; see ``Plan.rows``."""
        side, index = (0, self.source) if "source" in kind else (1, self.destination)
        count = self.nodes[side]
        return Rows(None, (), self.type * count + index, count * self.relations)

    def pattern(self, row: str, column: str) -> Pattern:
        """Return the edges between two kinds of rows; see ``Plan.pattern``."""
        (rows, height), (columns, width) = _index(self, row), _index(self, column)
        return Pattern(rows, columns, (height, width), True)

    def added(self, nodes: Tensor, relations: Tensor, kind: str) -> Tensor:
        """Add the values of each row's node and relation; see ``Plan.added``."""
        return (relations[:, None] + nodes).flatten(0, 1)

    @property
    def degrees(self) -> Tensor:
        """Edges of each edge's destination and relation, |N_τ(i)|; 1 where there is none."""
        slot = self.rows("destination_pair")
        there = torch.ones_like(slot.of_edge) if self.present is None else self.present.long()
        zeros = there.new_zeros(slot.total)
        return zeros.scatter_add(0, slot.of_edge, there)[slot.of_edge].clamp(min=1)


class Plan:
    """Pairs of a graph, reused over layers and epochs; edges are sorted by destination.

    Args:
        edge_index: Sources and destinations, (2, edges).
        edge_type: Relation of each edge, (edges,).
        nodes: Sources and destinations.
        relations: Relations.
    """

    is_static = False

    def __init__(
        self, edge_index: Tensor, edge_type: Tensor, nodes: tuple[int, int], relations: int
    ) -> None:
        order = torch.argsort(edge_index[1], stable=True)
        self.source, self.destination = edge_index[0][order], edge_index[1][order]
        self.type, self.nodes, self.relations = edge_type[order], nodes, relations
        self._rows: dict[str, Rows] = {}
        self._patterns: dict[tuple[str, str], Pattern] = {}

    @cached_property
    def counts(self) -> MessageCounts:
        """Sizes that decide what messages cost."""
        given, wanted = (self.rows(f"{side}_pair").total for side in ("source", "destination"))
        return MessageCounts(len(self.type), given, wanted, self.nodes[0], self.relations)

    @cached_property
    def degrees(self) -> Tensor:
        """Edges of each edge's destination and relation, |N_τ(i)|."""
        slots = self.rows("destination_pair")
        return torch.bincount(slots.of_edge, minlength=slots.total)[slots.of_edge]

    def rows(self, kind: str) -> Rows:
        """Return the rows of a typed product.

        Args:
            kind: ``source_pair``, ``destination_pair``; or ``source_edge``, ``destination_edge``,
                a row for each edge.
        """
        if kind not in self._rows:
            side = 0 if kind.startswith("source") else 1
            nodes = self.source if side == 0 else self.destination
            found = _unique if kind.endswith("pair") else _each
            self._rows[kind] = found(nodes, self.type, self.nodes[side], self.relations)
        return self._rows[kind]

    def pattern(self, row: str, column: str) -> Pattern:
        """Return the edges between two kinds of rows.

        Args:
            row: ``source``, ``destination``, or a kind of ``rows``.
            column: The same.
        """
        if (row, column) not in self._patterns:
            (rows, height), (columns, width) = _index(self, row), _index(self, column)
            self._patterns[row, column] = Pattern(rows, columns, (height, width))
        return self._patterns[row, column]

    def added(self, nodes: Tensor, relations: Tensor, kind: str) -> Tensor:
        """Add the values of each row's node and relation, (rows, channels).

        Args:
            nodes: (nodes, channels).
            relations: (relations, channels).
            kind: See ``rows``.
        """
        rows = self.rows(kind)
        assert rows.nodes is not None
        ends = torch.tensor([0, *rows.ends], device=nodes.device)
        repeated = relations.repeat_interleave(ends.diff(), 0)
        return nodes.index_select(0, rows.nodes) + repeated

    @cached_property
    def slots(self) -> Rows:
        """Rows of a typed product of sums, one for each unique (destination, relation)."""
        pairs = self.rows("destination_pair")
        return pairs._replace(nodes=torch.arange(pairs.total, device=self.type.device))

    @cached_property
    def fold(self) -> Pattern:
        """Sum of the rows of ``slots`` over relations."""
        pairs, every = self.rows("destination_pair"), self.slots.nodes
        assert pairs.nodes is not None
        assert every is not None
        return Pattern(pairs.nodes, every, (self.nodes[1], pairs.total))


AnyPlan = Plan | StaticPlan


def _index(plan: AnyPlan, kind: str) -> tuple[Tensor, int]:
    """Return the row or column of each edge, and how many there are."""
    if kind == "source":
        return plan.source, plan.nodes[0]
    if kind == "destination":
        return plan.destination, plan.nodes[1]
    found = plan.rows(kind)
    return found.of_edge, found.total


def _unique(nodes: Tensor, types: Tensor, count: int, relations: int) -> Rows:
    keys, of_edge = torch.unique(types * count + nodes, return_inverse=True)
    return Rows(keys % max(count, 1), _ends(keys, count, relations), of_edge, len(keys))


def _each(nodes: Tensor, types: Tensor, count: int, relations: int) -> Rows:
    order = torch.argsort(types, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return Rows(nodes[order], _ends(types[order], 1, relations), place, len(order))


def _ends(keys: Tensor, count: int, relations: int) -> list[int]:
    limits = torch.arange(1, relations + 1, device=keys.device) * max(count, 1)
    ends: list[int] = torch.searchsorted(keys, limits).tolist()
    return ends


def plan(
    edge_index: Tensor, edge_type: Tensor, nodes: int | tuple[int, int], relations: int
) -> Plan:
    """Find the unique pairs of a graph once, for all layers and epochs.

    Args:
        edge_index: Sources and destinations, (2, edges), int64.
        edge_type: Relation of each edge, (edges,), int64.
        nodes: Nodes; sources and destinations of a bipartite graph.
        relations: Relations.

    Raises:
        UsageError: Shapes that do not fit, or a number outside of its range.

    Example:
        >>> edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
        >>> plan(edges, torch.tensor([0, 0, 1]), 3, 2).counts
        MessageCounts(edges=3, source_pairs=2, destination_pairs=3, nodes=3, relations=2)
    """
    both = (nodes, nodes) if isinstance(nodes, int) else nodes
    require_edges(edge_index, edge_type, both, relations)
    return Plan(edge_index, edge_type, both, relations)


def require_edges(
    edge_index: Tensor, edge_type: Tensor, nodes: tuple[int, int], relations: int
) -> None:
    """Refuse edges that are none of the graph.

    Raises:
        UsageError: They are not.
    """
    if edge_index.ndim != 2 or len(edge_index) != 2 or edge_index.dtype != torch.int64:
        raise UsageError(
            "edge_index is an int64 tensor (2, edges), sources above destinations, not "
            f"{edge_index.dtype} {tuple(edge_index.shape)}"
        )
    if edge_type.shape != edge_index.shape[1:] or edge_type.dtype != torch.int64:
        raise UsageError(
            f"edge_type is an int64 tensor ({edge_index.shape[1]},), a relation for each edge, "
            f"not {edge_type.dtype} {tuple(edge_type.shape)}"
        )
    limits = (("source", edge_index[0], nodes[0]), ("destination", edge_index[1], nodes[1]))
    for name, values, count in (*limits, ("relation", edge_type, relations)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < count:
            raise UsageError(
                f"an edge has {name} {int(values.max() if values.min() >= 0 else values.min())}; "
                f"the numbers are 0 to {count - 1}: give the right number of "
                f"{'relations' if name == 'relation' else 'nodes'}"
            )
