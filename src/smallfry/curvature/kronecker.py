"""Kronecker algebra: damped solves with A ⊗ G, and its distance from a Fisher block.

With vec stacking columns, (A ⊗ G) vec(X) = vec(G X Aᵀ): A belongs to the inputs, G to the
outputs. All functions take a leading dimension of groups and any precision:

    A (groups, inputs, inputs)    G (groups, outputs, outputs)    X (groups, outputs, inputs)

Damped means (A ⊗ G + λ I)⁻¹: exact in the eigenbasis (Tikhonov), or with the damping split over
the factors, (A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹ with π² = (tr A / inputs) / (tr G / outputs), which
needs no eigenvectors (Martens and Grosse 2015, arXiv 1503.05671, section 6.3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.curvature.fisher import gram
from smallfry.curvature.rows import Rows


class Eigen(NamedTuple):
    """Eigendecomposition of a symmetric matrix, vectors diag(values) vectorsᵀ."""

    values: Tensor  # (groups, size), ascending, not negative
    vectors: Tensor  # (groups, size, size)


class Inverse(NamedTuple):
    """Damped inverse, and the damping added beyond the requested one."""

    matrix: Tensor  # (groups, size, size)
    raised: float  # factor on the damping; 1 if none was needed


class NotFiniteError(ArithmeticError):
    """NaN in a factor."""


def input_factor(rows: Rows) -> Tensor:
    """Compute A, the weighted mean of a aᵀ over samples and uses."""
    flat = rows.inputs.flatten(1, 2)  # (groups, samples · uses, inputs)
    weighted = flat if rows.weights is None else flat * rows.weights.reshape(-1, 1)
    return flat.transpose(1, 2) @ weighted / flat.shape[1]


def output_factor(rows: Rows) -> Tensor:
    """Compute G: sum over uses and draws, mean over samples, of g gᵀ."""
    flat = rows.gradients.flatten(1, 3)
    return flat.transpose(1, 2) @ flat / rows.samples


def reduced(rows: Rows) -> Rows:
    """Reduce to one use per sample: the mean of its inputs and the sum of its gradients.

    KFAC-reduce of Eschenhagen et al. 2023 (arXiv 2311.00636): exact where uses are averaged right
    behind a linear layer.
    """
    gradients, weights = rows.gradients.sum(3, keepdim=True), rows.weights
    if weights is None:
        return Rows(rows.inputs.mean(2, keepdim=True), gradients)
    total = weights.sum(1, keepdim=True)  # uses that are left out have no part in the mean
    shares = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
    inputs = (rows.inputs * shares[None, :, :, None]).sum(2, keepdim=True)
    return Rows(inputs, gradients, total / (weights > 0).sum(1, keepdim=True).clamp_min(1))


def eigendecompose(factor: Tensor) -> Eigen:
    """Compute eigenvalues and eigenvectors of a symmetric positive semi-definite factor.

    LAPACK's float32 routine may fail or give NaN on a rank-deficient, badly scaled matrix: it is
    scaled to a mean eigenvalue of 1 first. Where that was not enough, all eigenvalues are raised by
    that mean, which rounds them no more than the largest one does, and float64 is tried last.

    Raises:
        NotFiniteError: The factor is not finite.
    """
    if not bool(factor.isfinite().all()):
        raise NotFiniteError("a Kronecker factor is not finite")
    scale = _mean_diagonal(factor).clamp_min(torch.finfo(factor.dtype).tiny)[:, None, None]
    matrix = factor / scale
    for precision, shift in ((factor.dtype, 0.0), (factor.dtype, 1.0), (torch.float64, 0.0)):
        tried = matrix.to(precision, copy=True)
        tried.diagonal(dim1=1, dim2=2).add_(shift)
        try:
            values, vectors = torch.linalg.eigh(tried)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            values = (values - shift).clamp_min(0) * scale[:, 0].to(precision)
            return Eigen(values.to(factor), vectors.to(factor))
    raise NotFiniteError("a Kronecker factor can't be decomposed, even in float64")


def damped_inverse(factor: Tensor, damping: Tensor) -> Inverse:
    """Compute (factor + damping I)⁻¹ by Cholesky.

    A factor that is not positive definite in its own precision is tried in float64, then with
    ten times the damping, and so on.

    Args:
        factor: (groups, size, size), symmetric positive semi-definite.
        damping: (groups,), positive.

    Raises:
        NotFiniteError: The factor or the damping is not finite, or nothing helped.
    """
    if not bool(factor.isfinite().all()) or not bool(damping.isfinite().all()):
        raise NotFiniteError("a Kronecker factor is not finite")
    raised = 1.0
    for _ in range(12):
        for precision in dict.fromkeys((factor.dtype, torch.float64)):
            matrix = factor.to(precision, copy=True)
            matrix.diagonal(dim1=1, dim2=2).add_((raised * damping.to(precision))[:, None])
            lower, info = torch.linalg.cholesky_ex(matrix)
            if not bool(info.any()):
                inverse = torch.cholesky_inverse(lower)
                if bool(inverse.isfinite().all()):
                    return Inverse(inverse.to(factor.dtype), raised)
        raised *= 10.0
    raise NotFiniteError("a Kronecker factor can't be inverted with any damping")


def split_damping(mean_a: Tensor, mean_g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Split λ into (π√λ, √λ/π), each (groups,), the damping of the factors A and G.

    Args:
        mean_a: Mean eigenvalue of A, (groups,).
        mean_g: Mean eigenvalue of G, (groups,).
        damping: λ.
    """
    tiny = torch.finfo(mean_a.dtype).tiny ** 0.5
    pi = (mean_a.clamp_min(tiny) / mean_g.clamp_min(tiny)).sqrt()
    return pi * damping**0.5, damping**0.5 / pi


def solve_tikhonov(a: Eigen, g: Eigen, x: Tensor, damping: Tensor | float) -> Tensor:
    """Compute (A ⊗ G + λ I)⁻¹ X, exactly."""
    rotated = g.vectors.transpose(1, 2) @ x @ a.vectors
    rotated = rotated / (g.values[:, :, None] * a.values[:, None, :] + damping)
    return g.vectors @ rotated @ a.vectors.transpose(1, 2)


def inner_product(rows: Rows, a: Tensor, g: Tensor) -> Tensor:
    """Compute ⟨F, A ⊗ G⟩ = mean of tr(Wᵀ G W A), a scalar, without forming F."""
    if rows.uses == 1:  # (aᵀ A a)(gᵀ G g)
        x, y = rows.inputs[:, :, 0], rows.gradients[:, :, :, 0]
        per_sample = (((y @ g[:, None]) * y).sum((1, 3))) * ((x @ a) * x).sum(2)
        return per_sample.sum() / rows.samples
    total = rows.inputs.new_zeros(())
    for draw in rows.gradients.unbind(1):
        w = draw.transpose(2, 3) @ rows.inputs  # (groups, samples, outputs, inputs)
        total = total + ((g[:, None] @ w @ a[:, None]) * w).sum()
    return total / rows.samples


def squared_norm(a: Tensor, g: Tensor) -> Tensor:
    """Compute ‖A ⊗ G‖² over all groups, a scalar."""
    return ((a**2).sum((1, 2)) * (g**2).sum((1, 2))).sum()


def fisher_squared_norm(rows: Rows) -> Tensor:
    """Compute ‖F‖² of a block (of the block diagonal, for groups) from Gram matrices."""
    total = rows.inputs.new_zeros(())
    for h in range(rows.inputs.shape[0]):
        one = Rows(rows.inputs[h : h + 1], rows.gradients[h : h + 1])
        total = total + (gram(one) ** 2).sum()
    return total / rows.samples**2


def kronecker_error(rows: Rows, a: Tensor, g: Tensor) -> float:
    """Compute ‖F − A ⊗ G‖ / ‖F‖; 0 is exact, 1 is no better than zero."""
    fisher = fisher_squared_norm(rows)
    error = fisher - 2 * inner_product(rows, a, g) + squared_norm(a, g)
    return relative_error(error, fisher)


def pack(matrix: Tensor) -> Tensor:
    """Pack symmetric matrices without their repeated half, (groups, size (size + 1) / 2).

    LAPACK's rectangular full packed format: one corner block as it is, and the triangles of the
    two diagonal blocks folded into one rectangle. Triangle by triangle would copy row by row.
    """
    groups, size, _ = matrix.shape
    half, rest = size // 2, size - size // 2
    folded = matrix.new_zeros(groups, rest, half + 1)
    folded[:, :, :rest] = matrix[:, half:, half:].tril()
    folded[:, :half, 1:] += matrix[:, :half, :half].triu()
    return torch.cat([matrix[:, :half, half:].flatten(1), folded.flatten(1)], dim=1)


def unpack(packed: Tensor) -> Tensor:
    """Invert ``pack``."""
    corner, folded, half = _unfold(packed)
    size = half + folded.shape[1]
    matrix = packed.new_empty(packed.shape[0], size, size)
    first, last = folded[:, :half, 1:].triu(), folded[:, :, : size - half].tril()
    matrix[:, :half, :half] = first + first.triu(1).transpose(1, 2)
    matrix[:, half:, half:] = last + last.tril(-1).transpose(1, 2)
    matrix[:, :half, half:] = corner
    matrix[:, half:, :half] = corner.transpose(1, 2)
    return matrix


def packed_mean(packed: Tensor) -> Tensor:
    """Compute the mean eigenvalue of packed matrices, (groups,)."""
    _, folded, half = _unfold(packed)
    wide = folded.double()
    above = wide.diagonal(1, dim1=1, dim2=2).sum(1)
    trace = wide.diagonal(dim1=1, dim2=2).sum(1) + above
    return (trace / (half + folded.shape[1])).to(packed)


def _unfold(packed: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the corner block, the folded triangles, and the index of the diagonal blocks."""
    groups, count = packed.shape
    size = int(((8 * count + 1) ** 0.5 - 1) / 2 + 0.5)
    half, rest = size // 2, size - size // 2
    corner = packed[:, : half * rest].reshape(groups, half, rest)
    return corner, packed[:, half * rest :].reshape(groups, rest, half + 1), half


def _mean_diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def relative_error(squared: Tensor, reference: Tensor) -> float:
    """Compute √(squared / reference) of an error that rounding may have made negative."""
    if float(reference) == 0:
        return 0.0 if float(squared) == 0 else float("inf")
    return float((squared / reference).clamp_min(0).sqrt())
