"""Operations of relational layers: typed products, sums and dot products over edges, softmax.

Nothing here holds a number for each edge and channel: sums gather as they add, and gradients
gather again what the forward pass gathered.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from smallfry.kits.graphs.pairs import AnyPlan, Pattern, Plan, Rows

__all__ = ["add_relations_", "dots", "edge_softmax", "gather_sum", "typed_product"]

CHUNK = 1 << 16  # entries of a pattern whose rows are gathered at once


def typed_product(x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """Multiply nodes by the matrices of relations, once for each row.

    Args:
        x: (nodes, groups, inputs).
        weight: (relations, groups, inputs, outputs).
        rows: Node and relation of each row.

    Returns:
        (rows, groups, outputs).
    """
    if rows.nodes is None:
        found = torch.einsum("ngf,rgfd->rngd", x, weight)
        return found.reshape(-1, *weight.shape[1::2])
    product: Tensor = _TypedProduct.apply(x, weight, rows)
    return product


class _TypedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        _, groups, inputs, outputs = weight.shape
        assert rows.nodes is not None
        out = x.new_empty(rows.total, groups, outputs)
        for relation, start, stop in _segments(rows):
            taken = x.index_select(0, rows.nodes[start:stop])
            if groups == 1:
                torch.mm(
                    taken.view(-1, inputs),
                    weight[relation, 0],
                    out=out[start:stop].view(-1, outputs),
                )
            else:
                found = torch.bmm(taken.transpose(0, 1), weight[relation])
                out[start:stop] = found.transpose(0, 1)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows: Rows = ctx.rows
        assert rows.nodes is not None
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for relation, start, stop in _segments(rows):
            nodes = rows.nodes[start:stop]
            given = grad[start:stop].transpose(0, 1)
            if grad_x is not None:
                back = torch.bmm(given, weight[relation].transpose(1, 2))
                grad_x.index_add_(0, nodes, back.transpose(0, 1))
            if grad_weight is not None:
                taken = x.index_select(0, nodes).permute(1, 2, 0)
                torch.bmm(taken, given, out=grad_weight[relation])
        return grad_x, grad_weight, None


def _segments(rows: Rows) -> list[tuple[int, int, int]]:
    starts = [0, *rows.ends[:-1]]
    pairs = enumerate(zip(starts, rows.ends, strict=True))
    return [(relation, start, stop) for relation, (start, stop) in pairs if start < stop]


@torch.no_grad()
def add_relations_(
    total: Tensor, plan: Plan, x: Tensor, weight: Tensor, values: Tensor | None, aggregate: bool
) -> Tensor:
    """Add the messages of one relation after the other, so that those of one are held at a time.

    Args:
        total: (destinations, groups · outputs), changed in place.
        plan: Of the graph.
        x: Sources, (sources, groups, inputs).
        weight: (relations, groups, inputs, outputs).
        values: A factor for each edge, (edges,); None of ones.
        aggregate: Sum in front of the products, or behind them.
    """
    slots, pairs = plan.rows("destination_pair"), plan.rows("source_pair")
    kind = "source" if aggregate else "source_pair"
    order, starts, columns = plan.pattern("destination_pair", kind).by_row
    if values is not None:
        values = values if order is None else values[order]
    firsts = [0, *pairs.ends]
    assert slots.nodes is not None
    assert pairs.nodes is not None
    for relation, start, stop in _segments(slots):
        bags = starts[start : stop + 1]
        first, last = int(bags[0]), int(bags[-1])
        factors = None if values is None else values[first:last, None]
        where = columns[first:last]
        if aggregate:
            sums = _sums((None, bags - first, where), x.flatten(1)[:, None], factors)
            found = torch.matmul(sums.view(-1, *x.shape[1:]).transpose(0, 1), weight[relation])
            found = found.transpose(0, 1).flatten(1)
        else:
            begin = firsts[relation]
            taken = x.index_select(0, pairs.nodes[begin : firsts[relation + 1]])
            products = torch.matmul(taken.transpose(0, 1), weight[relation]).transpose(0, 1)
            rows = (None, bags - first, where - begin)
            found = _sums(rows, products.flatten(1)[:, None], factors)[:, 0]
        total.index_add_(0, slots.nodes[start:stop], found)
    return total


def gather_sum(pattern: Pattern, dense: Tensor, values: Tensor | None = None) -> Tensor:
    """Sum rows over the entries of a pattern: out_r = Σ values_e · dense_c(e).

    Args:
        pattern: Rows and columns of the entries.
        dense: (columns, groups, channels).
        values: A factor for each entry and group, (entries, groups), or (entries,); None of ones.

    Returns:
        (rows, groups, channels).
    """
    if values is not None and values.ndim == 1:
        whole = gather_sum(pattern, dense.flatten(1)[:, None], values[:, None])
        return whole.reshape(whole.shape[0], *dense.shape[1:])
    if pattern.is_static:
        taken = dense[pattern.column]
        taken = taken if values is None else taken * values[..., None]
        out = dense.new_zeros(pattern.shape[0], *dense.shape[1:])
        return out.scatter_add(0, pattern.row[:, None, None].expand_as(taken), taken)
    found: Tensor = _GatherSum.apply(dense, values, pattern)
    return found


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, values: Tensor | None, pattern: Pattern) -> Tensor:
        needed = ctx.needs_input_grad[1]
        ctx.save_for_backward(dense if needed else None, values)
        ctx.pattern = pattern
        return _sums(pattern.by_row, dense, values)

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dense, values = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        grad_dense = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_dense = _sums(pattern.by_column, grad, values)
        if ctx.needs_input_grad[1]:
            grad_values = _dots(pattern, grad, dense)
        return grad_dense, grad_values, None


def dots(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """Compute dot products of the rows and columns of a pattern's entries, (entries, groups).

    Args:
        pattern: Rows and columns of the entries.
        left: (rows, groups, channels).
        right: (columns, groups, channels).
    """
    if pattern.is_static:
        return (left[pattern.row] * right[pattern.column]).sum(-1)
    found: Tensor = _Dots.apply(left, right, pattern)
    return found


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.pattern = pattern
        return _dots(pattern, left, right)

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        left, right = ctx.saved_tensors
        needs, pattern = ctx.needs_input_grad, ctx.pattern
        grad_left = _sums(pattern.by_row, right, grad) if needs[0] else None
        grad_right = _sums(pattern.by_column, left, grad) if needs[1] else None
        return grad_left, grad_right, None


def _sums(
    compressed: tuple[Tensor | None, Tensor, Tensor], dense: Tensor, values: Tensor | None
) -> Tensor:
    """Sum by bags of embeddings, which gather and add without a copy for each entry."""
    order, starts, columns = compressed
    if values is not None and order is not None:
        values = values[order]
    if len(dense) == 0 or len(columns) == 0:
        return dense.new_zeros(len(starts) - 1, *dense.shape[1:])
    parts = []
    groups = 1 if values is None else dense.shape[1]
    whole = dense.reshape(len(dense), groups, -1)
    for group in range(groups):
        weights = None if values is None else values[:, group].contiguous()
        parts.append(
            F.embedding_bag(
                columns,
                whole[:, group].contiguous(),
                starts,
                mode="sum",
                per_sample_weights=weights,
                include_last_offset=True,
            )
        )
    out = parts[0] if groups == 1 else torch.stack(parts, dim=1)
    return out.view(len(starts) - 1, *dense.shape[1:])


def _dots(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """Compute dot products, some entries at a time."""
    out = left.new_empty(len(pattern.row), left.shape[1])
    size = max(1, CHUNK // max(1, left.shape[1] * left.shape[2]))
    for start in range(0, len(out), size):
        part = slice(start, start + size)
        gathered = left.index_select(0, pattern.row[part])
        gathered *= right.index_select(0, pattern.column[part])
        torch.sum(gathered, -1, out=out[part])
    return out


def edge_softmax(plan: AnyPlan, scores: Tensor) -> Tensor:
    """Normalise scores over the edges into each destination, whatever their relations.

    Args:
        plan: Of the graph.
        scores: (edges, heads), in the order of the plan.
    """
    if isinstance(plan, Plan):
        found: Tensor = _EdgeSoftmax.apply(scores, plan)
        return found
    present = plan.present
    if present is not None:
        scores = scores.masked_fill(~present[:, None], -1e30)
    index = plan.destination[:, None].expand_as(scores)
    most = scores.new_full((plan.nodes[1], scores.shape[1]), -1e30)
    most = most.scatter_reduce(0, index, scores.detach(), "amax")
    powers = scores - most[plan.destination]
    if present is not None:  # filled first: a tracer's constants may round to other sides
        powers = powers.masked_fill(~present[:, None], 0.0).exp() * present[:, None]
    else:
        powers = powers.exp()
    total = scores.new_zeros(plan.nodes[1], scores.shape[1]).scatter_add(0, index, powers)
    # at least 1 where there is an edge; an added 1e-16 would be optimised away in an export
    return powers / total[plan.destination].clamp(min=0.5)


class _EdgeSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, plan: Plan) -> Tensor:
        where = plan.destination
        most = scores.new_full((plan.nodes[1], scores.shape[1]), -torch.inf)
        most.scatter_reduce_(0, where[:, None].expand_as(scores), scores, "amax")
        powers = scores.sub(most[where]).exp_()
        powers /= _total(plan, powers)[where] + 1e-16
        ctx.save_for_backward(powers)
        ctx.plan = plan
        return powers

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (shares,) = ctx.saved_tensors
        mean = _total(ctx.plan, shares * grad)
        return shares * (grad - mean[ctx.plan.destination]), None


def _total(plan: Plan, values: Tensor) -> Tensor:
    zeros = values.new_zeros(plan.nodes[1], values.shape[1])
    return zeros.index_add_(0, plan.destination, values)
