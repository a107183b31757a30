"""Relational attention whose messages are computed once for each unique pair.

    RGAT   a = LeakyReLU(x_i W_τ q + x_j W_τ k);  α = softmax over all edges into i;
           out_i = Σ α x_j W_τ + bias
    HGT    a = Q_i · (K_j A_τ) p_τ / √D;  α = softmax over all edges into i;
           out_i = lin(gelu(Σ α V_j M_τ)), mixed with x_i by a gate where widths agree

Busbridge et al. 2019, arXiv 1904.05811; Hu et al. 2020, arXiv 2003.01332. Parameters have the names
and shapes of torch-geometric's layers; for executions see ``relational``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.kits.graphs.pairs import AnyPlan, MessageCounts, Plan, StaticPlan, require_edges
from smallfry.kits.graphs.products import dots, edge_softmax, gather_sum, typed_product
from smallfry.kits.graphs.relational import (
    Relational,
    glorot_,
    product_and_fold,
    require_parts,
)

__all__ = ["EdgeName", "HGTConv", "RGATConv"]

EdgeName = tuple[str, str, str]  # source's type, relation, destination's type
UNUSED = ("w", "l1", "b1", "l2", "b2")  # of torch-geometric's RGAT, without modulation


class RGATConv(Relational):
    """Relational graph attention, additive and across relations.

    Args:
        in_channels: Channels of the nodes.
        out_channels: Channels of each head.
        relations: Relations.
        heads: Heads, H.
        bases: W_τ = Σ_b att_τb V_b with so many; None of a matrix for each relation.
        concat: Concatenate the heads, or take their mean.
        negative_slope: Of LeakyReLU.
        bias: Add a bias.
        execution: See ``relational``. But for edges, W_τ q and W_τ k are formed first.

    Raises:
        UsageError: No heads, or no bases.

    Example:
        >>> layer = RGATConv(16, 8, relations=2, heads=4)
        >>> edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
        >>> layer(torch.zeros(3, 16), edges, torch.tensor([0, 0, 1])).shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        relations: int,
        heads: int = 1,
        bases: int | None = None,
        concat: bool = True,
        negative_slope: float = 0.2,
        bias: bool = True,
        execution: str = "auto",
    ) -> None:
        super().__init__(relations, execution)
        require_parts(heads=heads, bases=bases)
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.concat, self.negative_slope = concat, negative_slope
        width = heads * out_channels
        self.q = nn.Parameter(torch.empty(width, heads))
        self.k = nn.Parameter(torch.empty(width, heads))
        self.bias = nn.Parameter(torch.zeros(width if concat else out_channels)) if bias else None
        drawn = [self.q, self.k]
        if bases is None:
            self.weight = nn.Parameter(torch.empty(relations, in_channels, width))
            drawn.append(self.weight)
        else:
            self.att = nn.Parameter(torch.empty(relations, bases))
            self.basis = nn.Parameter(torch.empty(bases, in_channels, width))
            drawn += [self.att, self.basis]
        for tensor in drawn:
            glorot_(tensor.data)
        self.register_load_state_dict_pre_hook(_without_modulation)  # type: ignore[no-untyped-call]

    @property
    def matrices(self) -> Tensor:
        """W_τ, (relations, in_channels, heads · out_channels)."""
        if hasattr(self, "weight"):
            return self.weight
        mixed = self.att @ self.basis.flatten(1)
        return mixed.view(self.relations, *self.basis.shape[1:])

    def macs(self, counts: MessageCounts, execution: str) -> int:
        """Count the multiply-accumulates of all products; sums over edges are not counted."""
        given, heads, width = self.in_channels, self.heads, self.heads * self.out_channels
        if execution == "edges":
            return 2 * counts.edges * (given * width + width * heads)
        formed = 2 * counts.relations * given * width * heads
        pairs = counts.source_pairs + counts.destination_pairs
        if execution == "nodes":
            pairs = 2 * counts.rows("nodes")
        return formed + pairs * given * heads + counts.rows(execution) * given * width

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_type: Tensor, plan: AnyPlan | None = None
    ) -> Tensor:
        """Compute (nodes, heads · out_channels), or (nodes, out_channels) of a mean.

        Args:
            x: Nodes (nodes, in_channels).
            edge_index: Sources and destinations, (2, edges).
            edge_type: (edges,).
            plan: Of this graph; None makes one.
        """
        found, chosen = self.planned(edge_index, edge_type, (x.shape[0], x.shape[0]), plan)
        if chosen == "edges":
            out = self._of_edges(x, found)
        else:
            weight = self.matrices
            own = self._scores(x, weight @ self.q, found, "destination_pair")
            other = self._scores(x, weight @ self.k, found, "source_pair")
            shares = edge_softmax(found, F.leaky_relu(own + other, self.negative_slope))
            if chosen == "aggregate":
                assert isinstance(found, Plan)
                copies = x[:, None].expand(-1, self.heads, -1)
                slots = gather_sum(found.pattern("destination_pair", "source"), copies, shares)
                split = weight.view(self.relations, -1, self.heads, self.out_channels)
                out = product_and_fold(found, slots, split.transpose(1, 2))
            else:
                messages = typed_product(x[:, None], weight[:, None], found.rows("source_pair"))
                out = self._sum(found, "source_pair", messages, shares)
        total = out.flatten(1) if self.concat else out.mean(1)
        return total if self.bias is None else total + self.bias

    def _scores(self, x: Tensor, formed: Tensor, plan: AnyPlan, kind: str) -> Tensor:
        """Compute one side's scores of each pair, for each edge."""
        rows = plan.rows(kind)
        return typed_product(x[:, None], formed[:, None], rows)[:, 0].index_select(0, rows.of_edge)

    def _sum(self, plan: AnyPlan, kind: str, messages: Tensor, shares: Tensor) -> Tensor:
        split = messages.view(-1, self.heads, self.out_channels)
        return gather_sum(plan.pattern("destination", kind), split, shares)

    def _of_edges(self, x: Tensor, plan: AnyPlan) -> Tensor:
        weight = self.matrices[:, None]
        sides = [plan.rows("destination_edge"), plan.rows("source_edge")]
        own, messages = (typed_product(x[:, None], weight, rows) for rows in sides)
        scores = (own[:, 0] @ self.q)[sides[0].of_edge] + (messages[:, 0] @ self.k)[
            sides[1].of_edge
        ]
        shares = edge_softmax(plan, F.leaky_relu(scores, self.negative_slope))
        return self._sum(plan, "source_edge", messages, shares)


def _without_modulation(
    module: nn.Module, state: dict[str, Any], prefix: str, *others: Any
) -> None:
    for name in UNUSED:
        state.pop(prefix + name, None)


def _require_relation(
    relation: EdgeName, edges: Tensor, nodes: Mapping[str, int], known: Sequence[EdgeName]
) -> None:
    """Refuse edges of a relation, whose ends would else be nodes of another type."""
    name = "__".join(relation)
    if relation not in known:
        names = ", ".join("__".join(each) for each in known)
        raise UsageError(f"the layer has no relation '{name}'; its relations are {names}")
    missing = [end for end in (relation[0], relation[2]) if end not in nodes]
    if missing:
        raise UsageError(f"relation '{name}' has edges, and no nodes of type '{missing[0]}' came")
    types = torch.zeros(edges.shape[-1], dtype=torch.int64, device=edges.device)
    try:
        require_edges(edges, types, (nodes[relation[0]], nodes[relation[2]]), 1)
    except UsageError as error:
        raise UsageError(f"relation '{name}': {error}") from None


class ByType(nn.Module):
    """Linear layers by the type of node.

    Args:
        layers: By the name of the type.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.lins = nn.ModuleDict(layers)


class ByRelation(nn.Module):
    """Matrices of heads and relations: that of head h and relation τ has index h · relations + τ.

    Args:
        heads: Heads.
        relations: Relations.
        width: Rows and columns.
    """

    def __init__(self, heads: int, relations: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(heads * relations, width, width))
        bound = width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    @property
    def matrices(self) -> Tensor:
        """(relations, heads, width, width)."""
        return self.weight.view(self.heads, -1, *self.weight.shape[1:]).transpose(0, 1)


class HGTConv(Relational):
    """Heterogeneous graph transformer layer.

    Args:
        in_channels: Channels of the nodes, of all types or by type.
        out_channels: Channels wanted.
        node_types: Names of types.
        edge_types: Names of relations, with the types of both ends.
        heads: Heads, H; D = out_channels / H.
        execution: See ``relational``. With aggregate, Q_i A_τᵀ is formed for each unique
            (destination, relation), and M_τ follows the sum.

    Raises:
        UsageError: Channels that the heads don't divide.

    Example:
        >>> layer = HGTConv(4, 8, ("a", "b"), [("a", "to", "b")], heads=2)
        >>> x = {"a": torch.zeros(3, 4), "b": torch.zeros(2, 4)}
        >>> layer(x, {("a", "to", "b"): torch.tensor([[0, 2], [1, 1]])})["b"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_channels: int | Mapping[str, int],
        out_channels: int,
        node_types: Sequence[str],
        edge_types: Sequence[EdgeName],
        heads: int = 1,
        execution: str = "auto",
    ) -> None:
        super().__init__(len(edge_types), execution)
        require_parts(heads=heads)
        if out_channels % heads:
            raise UsageError(f"{out_channels} channels can't be divided among {heads} heads")
        given = in_channels
        widths = {t: given if isinstance(given, int) else given[t] for t in node_types}
        self.node_types, self.edge_types = [*node_types], [*edge_types]
        self.out_channels, self.heads, self.width = out_channels, heads, out_channels // heads
        self.kqv_lin = ByType({t: nn.Linear(n, 3 * out_channels) for t, n in widths.items()})
        self.out_lin = ByType({t: nn.Linear(out_channels, out_channels) for t in node_types})
        self.k_rel = ByRelation(heads, len(edge_types), self.width)
        self.v_rel = ByRelation(heads, len(edge_types), self.width)
        self.skip = nn.ParameterDict({t: nn.Parameter(torch.ones(1)) for t in node_types})
        names = ["__".join(name) for name in edge_types]
        self.p_rel = nn.ParameterDict({n: nn.Parameter(torch.ones(1, heads)) for n in names})

    def macs(self, counts: MessageCounts, execution: str) -> int:
        """Count the multiply-accumulates of products by relation's matrices."""
        return 2 * counts.rows(execution) * self.out_channels * self.width

    def forward(
        self,
        x: Mapping[str, Tensor],
        edge_index: Mapping[EdgeName, Tensor],
        plan: AnyPlan | None = None,
    ) -> dict[str, Tensor]:
        """Compute (nodes, out_channels) of each type that a relation leads to.

        Args:
            x: Nodes (nodes, channels) by type.
            edge_index: Sources and destinations, (2, edges), by relation.
            plan: Of this graph, from ``join``; None makes one.

        Raises:
            UsageError: A type or relation that the layer does not have.
        """
        index, types = self.join({t: len(nodes) for t, nodes in x.items()}, edge_index)
        parts = {t: self.kqv_lin.lins[t](nodes) for t, nodes in x.items()}
        summed = self._attend(torch.cat([*parts.values()]), index, types, plan)
        leads = {name[2] for name in self.edge_types}
        split = zip(x, torch.split(summed, [len(nodes) for nodes in x.values()]), strict=True)
        return {t: self._finish(t, rows, x[t]) for t, rows in split if t in leads}

    def join(
        self, nodes: Mapping[str, int], edge_index: Mapping[EdgeName, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Number all nodes in the order of their types: edges (2, edges), relations (edges,).

        Args:
            nodes: Nodes of each type.
            edge_index: By relation.

        Raises:
            UsageError: A type or relation that the layer does not have, or an edge whose ends are
                no nodes of its relation's types.
        """
        starts, total = {}, 0
        for name, count in nodes.items():
            starts[name], total = total, total + count
        unknown = sorted({*starts} - {*self.node_types})
        if unknown:
            raise UsageError(
                f"the layer has no type '{unknown[0]}'; its types are {', '.join(self.node_types)}"
            )
        for relation, edges in edge_index.items():
            _require_relation(relation, edges, nodes, self.edge_types)
        parts, types = [torch.empty(2, 0, dtype=torch.int64)], []
        for relation, edges in edge_index.items():
            first = torch.tensor([[starts[relation[0]]], [starts[relation[2]]]])
            parts.append(edges + first.to(edges))
            types += [self.edge_types.index(relation)] * edges.shape[1]
        index = torch.cat([part.to(parts[-1].device) for part in parts], dim=1)
        return index, torch.tensor(types, dtype=torch.int64, device=index.device)

    def flat(
        self,
        x: Tensor,
        node_type: Tensor,
        edge_index: Tensor,
        edge_type: Tensor,
        plan: AnyPlan | None = None,
    ) -> Tensor:
        """Compute (nodes, out_channels) of nodes that all have the same channels.

        Args:
            x: Nodes (nodes, channels).
            node_type: (nodes,), in the order of ``node_types``.
            edge_index: Sources and destinations, (2, edges).
            edge_type: (edges,), in the order of ``edge_types``.
            plan: Of this graph; None makes one.
        """
        fixed = isinstance(plan, StaticPlan)
        chosen = [node_type == number for number in range(len(self.node_types))]
        masks = [*zip(self.node_types, chosen, strict=True)]
        lins = self.kqv_lin.lins
        if fixed:  # every node by every layer: shapes don't depend on types
            kqv = sum(lins[t](x) * mask[:, None] for t, mask in masks)
            assert isinstance(kqv, Tensor)
            rows = self._attend(kqv, edge_index, edge_type, plan)
            out = sum(self._finish(t, rows, x) * mask[:, None] for t, mask in masks)
            assert isinstance(out, Tensor)
            return out
        places = [mask.nonzero()[:, 0] for _, mask in masks]
        back = torch.cat(places).argsort()
        parts = [lins[t](x[at]) for t, at in zip(self.node_types, places, strict=True)]
        rows = self._attend(torch.cat(parts)[back], edge_index, edge_type, plan)
        pairs = zip(self.node_types, places, strict=True)
        return torch.cat([self._finish(t, rows[at], x[at]) for t, at in pairs])[back]

    def _attend(
        self, kqv: Tensor, edge_index: Tensor, edge_type: Tensor, plan: AnyPlan | None
    ) -> Tensor:
        found, chosen = self.planned(edge_index, edge_type, (kqv.shape[0], kqv.shape[0]), plan)
        keys, queries, values = kqv.reshape(kqv.shape[0], 3, self.heads, self.width).unbind(1)
        prior = torch.stack([self.p_rel["__".join(name)][0] for name in self.edge_types])
        to_keys, to_values = self.k_rel.matrices, self.v_rel.matrices
        to_keys = to_keys * (prior * self.width**-0.5)[..., None, None]
        if chosen == "aggregate":
            assert isinstance(found, Plan)
            pattern = found.pattern("destination_pair", "source")
            rows = found.rows("destination_pair")
            asked = typed_product(queries, to_keys.transpose(2, 3), rows)
            shares = edge_softmax(found, dots(pattern, asked, keys))
            out = product_and_fold(found, gather_sum(pattern, values, shares), to_values)
        else:
            kind = "source_edge" if chosen == "edges" else "source_pair"
            pattern, rows = found.pattern("destination", kind), found.rows(kind)
            scores = dots(pattern, queries, typed_product(keys, to_keys, rows))
            messages = typed_product(values, to_values, rows)
            out = gather_sum(pattern, messages, edge_softmax(found, scores))
        return out.flatten(1)

    def _finish(self, name: str, summed: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.out_lin.lins[name](F.gelu(summed))
        if x.shape[1] != self.out_channels:
            return out
        gate = self.skip[name].sigmoid()
        mixed: Tensor = gate * out + (1 - gate) * x
        return mixed
