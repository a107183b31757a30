"""Relational convolutions whose messages are computed once for each unique pair.

    RGCN   out_i = x_i root + bias + Σ_τ Σ_{j→i} (1/|N_τ(i)|) x_j W_τ
    GINE   out_i = nn((1 + ε) x_i + Σ relu(x_j + e_τ))

Schlichtkrull et al. 2018, arXiv 1703.06103; Hu et al. 2020, arXiv 1905.12265. Parameters have the
names and shapes of torch-geometric's layers; for executions see ``relational``.
"""

import torch
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.kits.graphs.pairs import AnyPlan, MessageCounts, Plan, StaticPlan
from smallfry.kits.graphs.products import add_relations_, gather_sum, typed_product
from smallfry.kits.graphs.relational import (
    Relational,
    glorot_,
    product_and_fold,
    require_parts,
)

__all__ = ["GINEConv", "RGCNConv"]


def _pair(x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return x if isinstance(x, tuple) else (x, x)


class RGCNConv(Relational):
    """Relational graph convolution.

    Args:
        in_channels: Channels of the nodes; of sources and destinations if they differ.
        out_channels: Channels wanted.
        relations: Relations.
        bases: W_τ = Σ_b comp_τb V_b with so many; None of a matrix for each relation.
        blocks: Blocks of a block-diagonal W_τ; None of one.
        aggr: ``mean`` over the edges of a destination and relation, ``sum``, or ``max`` of their
            messages, summed over relations.
        root: Add x_i root.
        bias: Add a bias.
        execution: See the module; ``max`` has edges and compact.

    Raises:
        UsageError: Settings that exclude each other.

    Example:
        >>> layer = RGCNConv(16, 32, relations=2, execution="compact")
        >>> edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
        >>> layer(torch.zeros(3, 16), edges, torch.tensor([0, 0, 1])).shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        relations: int,
        bases: int | None = None,
        blocks: int | None = None,
        aggr: str = "mean",
        root: bool = True,
        bias: bool = True,
        execution: str = "auto",
    ) -> None:
        super().__init__(relations, execution)
        given, own = in_channels if isinstance(in_channels, tuple) else (in_channels, in_channels)
        self.in_channels, self.out_channels, self.aggr = given, out_channels, aggr
        if aggr not in ("mean", "sum", "max"):
            raise UsageError(f"aggr is mean, sum or max, not '{aggr}'")
        if aggr == "max" and execution not in ("edges", "compact"):
            raise UsageError(
                f"a maximum of messages can't move in front of a product: with aggr max, execution "
                f"is edges or compact, not {execution}"
            )
        require_parts(bases=bases, blocks=blocks)
        if bases is not None and blocks is not None:
            raise UsageError("weights have bases or blocks, not both")
        if blocks is not None and (given % blocks or out_channels % blocks):
            raise UsageError(f"{given} and {out_channels} channels can't be divided in {blocks}")
        self.blocks = blocks
        shape = (bases or relations, given, out_channels)
        if blocks is not None:
            shape = (relations, blocks, given // blocks, out_channels // blocks)  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.empty(shape))
        self.comp = nn.Parameter(torch.empty(relations, bases)) if bases is not None else None
        self.root = nn.Parameter(torch.empty(own, out_channels)) if root else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        for tensor in (self.weight, self.comp, self.root):
            if tensor is not None:
                glorot_(tensor.data)

    @property
    def matrices(self) -> Tensor:
        """W_τ, (relations, blocks, inputs, outputs)."""
        if self.blocks is not None:
            return self.weight
        if self.comp is None:
            return self.weight[:, None]
        mixed = self.comp @ self.weight.flatten(1)
        return mixed.view(self.relations, 1, *self.weight.shape[1:])

    def macs(self, counts: MessageCounts, execution: str) -> int:
        """Count the multiply-accumulates of the messages' products."""
        return counts.rows(execution) * self.in_channels * self.out_channels // (self.blocks or 1)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Tensor,
        edge_type: Tensor,
        plan: AnyPlan | None = None,
    ) -> Tensor:
        """Compute (destinations, out_channels).

        Args:
            x: Nodes (nodes, in_channels), or sources and destinations.
            edge_index: Sources and destinations, (2, edges).
            edge_type: (edges,).
            plan: Of this graph; None makes one.
        """
        sources, own = _pair(x)
        found, chosen = self.planned(edge_index, edge_type, (sources.shape[0], own.shape[0]), plan)
        if self.aggr == "max" and isinstance(found, StaticPlan):
            raise UsageError("a maximum has no plan of fixed shapes: make one with plan()")
        weight = self.matrices
        given = sources.reshape(sources.shape[0], *weight.shape[1:3])
        shares = found.degrees.to(given.dtype).reciprocal() if self.aggr == "mean" else None
        if isinstance(found, StaticPlan) and found.present is not None:
            there = found.present.to(given.dtype)
            shares = there if shares is None else there * shares
        if chosen in ("compact", "aggregate") and self.aggr != "max" and not self._learns(x):
            assert isinstance(found, Plan)
            aggregate = chosen == "aggregate"
            return add_relations_(self._own(own), found, given, weight, shares, aggregate)
        if chosen == "aggregate":
            assert isinstance(found, Plan)
            slots = gather_sum(found.pattern("destination_pair", "source"), given, shares)
            out = product_and_fold(found, slots, weight)
        else:
            kind = "source_edge" if chosen == "edges" else "source_pair"
            messages = typed_product(given, weight, found.rows(kind))
            if self.aggr == "max":
                out = _largest(found, messages, found.rows(kind).of_edge)
            else:
                out = gather_sum(found.pattern("destination", kind), messages, shares)
        return out.flatten(1) + self._own(own)

    def _learns(self, x: Tensor | tuple[Tensor, Tensor]) -> bool:
        """Return whether a gradient will be wanted."""
        tensors = (*_pair(x), *self.parameters())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def _own(self, x: Tensor) -> Tensor:
        """Compute what a node adds to its messages, (nodes, out_channels)."""
        if self.root is not None:
            return x @ self.root if self.bias is None else torch.addmm(self.bias, x, self.root)
        own = x.new_zeros(x.shape[0], self.out_channels)
        return own if self.bias is None else own + self.bias


def _largest(plan: AnyPlan, messages: Tensor, of_edge: Tensor) -> Tensor:
    """Take the largest message of each destination and relation, and sum over relations."""
    assert isinstance(plan, Plan)
    slots, (groups, channels) = plan.rows("destination_pair"), messages.shape[1:]
    index = slots.of_edge[:, None].expand(-1, groups * channels)
    most = messages.new_zeros(slots.total, groups * channels).scatter_reduce(
        0, index, messages.flatten(1)[of_edge], "amax", include_self=False
    )
    return gather_sum(plan.fold, most.view(-1, groups, channels))


class GINEConv(Relational):
    """Isomorphism layer with a feature of each relation.

    Args:
        nn: Network of the sums.
        channels: Of the nodes.
        relations: Relations.
        eps: ε, a buffer.
        execution: edges, compact, nodes, or auto, which is compact.

    Raises:
        UsageError: The execution aggregate: a sum can't move in front of relu.

    Example:
        >>> layer = GINEConv(nn.Linear(16, 8), 16, relations=2)
        >>> edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
        >>> layer(torch.zeros(3, 16), edges, torch.tensor([0, 0, 1])).shape
        torch.Size([3, 8])
    """

    eps: Tensor

    def __init__(
        self,
        nn: nn.Module,
        channels: int,
        relations: int,
        eps: float = 0.0,
        execution: str = "auto",
    ) -> None:
        super().__init__(relations, execution)
        if execution == "aggregate":
            raise UsageError("a sum can't move in front of relu: execution is edges or compact")
        self.nn = nn
        self.embedding = torch.nn.Parameter(torch.randn(relations, channels))
        self.register_buffer("eps", torch.tensor([eps]))

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_type: Tensor, plan: AnyPlan | None = None
    ) -> Tensor:
        """Compute what ``nn`` gives for each node.

        Args:
            x: Nodes (nodes, channels).
            edge_index: Sources and destinations, (2, edges).
            edge_type: (edges,).
            plan: Of this graph; None makes one.
        """
        found, chosen = self.planned(edge_index, edge_type, (x.shape[0], x.shape[0]), plan)
        kind = "source_edge" if chosen == "edges" else "source_pair"
        messages = found.added(x, self.embedding, kind).relu()
        present = None
        if isinstance(found, StaticPlan) and found.present is not None:
            present = found.present.to(x.dtype)
        sums = gather_sum(found.pattern("destination", kind), messages[:, None], present)[:, 0]
        out: Tensor = self.nn(sums + (1 + self.eps) * x)
        return out
