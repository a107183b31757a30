"""Diagonal in a Kronecker eigenbasis, full or truncated (EKFAC, George et al. 2018).

    F ≈ Σ s_ij P_j ⊗ Q_i,    P_j = u_j u_jᵀ of inputs, Q_i = v_i v_iᵀ of outputs

U (groups, inputs, kept) and V (groups, outputs, kept) are orthonormal. Where they are not whole,
what they leave is one more entry, the *tail*: P = I − U Uᵀ, whose entries of s are means over all
directions in it. Each s_ij is the mean of Σ over samples (v_iᵀ W u_j)², with W a sample's whole
gradient, so that this is F's orthogonal projection on the span of the products P_j ⊗ Q_i: nothing
in that span is nearer to F, no product of factors with these eigenvectors and flat tails either,
and the trace is F's (arXiv 1806.03884, where bases are whole). s is (groups, entries of outputs,
entries of inputs), the tail last; nothing else here is larger than a thin product.
"""

import torch
from torch import Tensor

from smallfry.curvature.kronecker import fisher_squared_norm, relative_error
from smallfry.curvature.rows import Rows


def basis_second_moments(rows: Rows, qa: Tensor, qg: Tensor, chunk: int = 64) -> Tensor:
    """Compute s: the mean of (V V⊥)ᵀ W (U U⊥) squared, averaged over the tails.

    W is the whole gradient of a sample, so that this is exact for shared weights too.

    Args:
        rows: Rows of the block.
        qa: U, (groups, inputs, kept).
        qg: V, (groups, outputs, kept).
        chunk: Samples at a time whose gradients are formed, where weights are shared.
    """
    a = torch.einsum("hnti,hij->hntj", rows.inputs, qa)
    g = torch.einsum("hknto,hop->hkntp", rows.gradients, qg)
    if rows.uses == 1:
        squares = _squares(g[:, :, :, 0], rows.gradients[:, :, :, 0]).sum(1)
        return squares.transpose(1, 2) @ _squares(a[:, :, 0], rows.inputs[:, :, 0]) / rows.samples
    total: Tensor = rows.inputs.new_zeros(())
    for draw, seen in zip(g.unbind(1), rows.gradients.unbind(1), strict=True):
        for start in range(0, rows.samples, chunk):
            part = slice(start, start + chunk)
            few = Rows(rows.inputs[:, part], seen[:, part].unsqueeze(1))
            total = total + _shared(few, a[:, part], draw[:, part])
    return total / rows.samples


def solve_diagonal(qa: Tensor, qg: Tensor, values: Tensor, x: Tensor, damping: float) -> Tensor:
    """Compute (F̂ + λ I)⁻¹ X.

    Args:
        qa: U, (groups, inputs, kept).
        qg: V, (groups, outputs, kept).
        values: s.
        x: (groups, outputs, inputs).
        damping: λ.
    """
    outputs, kept = qg.shape[1:]
    if kept == outputs and qa.shape[1] == qa.shape[2]:
        rotated = qg.transpose(1, 2) @ x @ qa
        return qg @ (rotated / (values + damping)) @ qa.transpose(1, 2)
    inverse = 1 / (values + damping)
    turned = qg.transpose(1, 2) @ x
    if kept == outputs:
        return qg @ _scale_rows(turned, inverse, qa)
    # as if the tail of the outputs were everything, and then what V's rows have beside that
    tail = inverse[:, kept:]
    beside = _scale_rows(turned, inverse[:, :kept] - tail, qa)
    return _scale_rows(x, tail, qa).baddbmm_(qg, beside)


def multiplicities(values: Tensor, outputs: int, inputs: int) -> Tensor:
    """Count the directions that each entry of s stands for; 1 except in the tails."""
    counts = []
    for size, entries in zip((outputs, inputs), values.shape[1:], strict=True):
        counts.append(values.new_ones(entries))
        counts[-1][-1] = size - entries + 1
    return torch.outer(*counts)


def overlaps(new: Tensor, old: Tensor) -> Tensor:
    """Compute squared overlaps of new with old directions, tails last and averaged over.

    The diagonal of the same operator in other bases is O_g s O_aᵀ, with the same trace: rows add
    up to 1, and columns, each row taken as often as it has directions, to the old multiplicities.

    Args:
        new: (groups, size, kept).
        old: (groups, size, kept).

    Returns:
        (groups, new entries, old entries).
    """
    squares = (new.transpose(1, 2) @ old) ** 2
    size = new.shape[1]
    counts = squares.new_ones(1, 1, old.shape[2])
    if left := size - old.shape[2]:
        squares = torch.cat([squares, (1 - squares.sum(2, keepdim=True)).clamp_min(0)], 2)
        counts = torch.cat([counts, counts.new_full((1, 1, 1), left)], 2)
    if left := size - new.shape[2]:
        rest = (counts - squares.sum(1, keepdim=True)).clamp_min(0) / left
        squares = torch.cat([squares, rest], 1)
    return squares


def diagonal_error(rows: Rows, qa: Tensor, qg: Tensor, values: Tensor) -> float:
    """Compute ‖F − F̂‖ / ‖F‖ for any s."""
    fisher = fisher_squared_norm(rows)
    mine = basis_second_moments(rows, qa, qg)
    counts = multiplicities(values, qg.shape[1], qa.shape[1])
    return relative_error(fisher + (counts * (values**2 - 2 * mine * values)).sum(), fisher)


def _scale_rows(x: Tensor, scales: Tensor, qa: Tensor) -> Tensor:
    """Scale row i of X by Σ_j scales_ij P_j; ``scales`` (groups, rows or 1, entries of inputs)."""
    inputs, kept = qa.shape[1:]
    if kept == inputs:
        return (x @ qa).mul_(scales) @ qa.transpose(1, 2)
    tail = scales[:, :, kept:]
    return (tail * x).baddbmm_((x @ qa).mul_(scales[:, :, :kept] - tail), qa.transpose(1, 2))


def _squares(projected: Tensor, whole: Tensor) -> Tensor:
    """Compute squared coordinates, and the mean over the tail; features last."""
    squares = projected**2
    if left := whole.shape[-1] - projected.shape[-1]:
        norms = torch.linalg.vector_norm(whole, dim=-1, keepdim=True) ** 2
        rest = (norms - squares.sum(-1, keepdim=True)).clamp_min(0) / left
        squares = torch.cat([squares, rest], -1)
    return squares


def _shared(rows: Rows, a: Tensor, g: Tensor) -> Tensor:
    """Sum squares over samples where a weight is used several times.

    Args:
        rows: Inputs, and the gradients of one draw.
        a: Inputs in the basis, (groups, samples, uses, kept).
        g: Gradients in the basis, (groups, samples, uses, kept).
    """
    x, y = rows.inputs, rows.gradients[:, 0]
    total = ((g.transpose(2, 3) @ a) ** 2).sum(1)
    left_a, left_g = x.shape[-1] - a.shape[-1], y.shape[-1] - g.shape[-1]
    if not left_a and not left_g:
        return total
    if rows.uses * (x.shape[-1] + y.shape[-1]) <= x.shape[-1] * y.shape[-1]:
        # Gram matrices of what the bases leave of each use
        rest_a = x @ x.transpose(2, 3) - a @ a.transpose(2, 3)
        rest_g = y @ y.transpose(2, 3) - g @ g.transpose(2, 3)
        beside = (g * (rest_a @ g)).sum((1, 2))
        below = (a * (rest_g @ a)).sum((1, 2))
        corner = (rest_a * rest_g).sum((1, 2, 3))
    else:
        w = y.transpose(2, 3) @ x  # (groups, samples, outputs, inputs)
        beside = ((g.transpose(2, 3) @ x) ** 2).sum((1, 3)) - total.sum(2)
        below = ((y.transpose(2, 3) @ a) ** 2).sum((1, 2)) - total.sum(1)
        corner = (w**2).sum((1, 2, 3)) - total.sum((1, 2)) - beside.sum(1) - below.sum(1)
    if left_a:
        total = torch.cat([total, beside.clamp_min(0)[:, :, None] / left_a], 2)
        below = torch.cat([below, corner[:, None] / left_a], 1)
    if left_g:
        total = torch.cat([total, below.clamp_min(0)[:, None] / left_g], 1)
    return total
