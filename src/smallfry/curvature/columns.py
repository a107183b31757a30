"""Rearranged Fisher of a block without weight sharing, by sample-sized Gram matrices.

Rearranged so that R ⊗ S becomes vec(R) vec(S)ᵀ (Van Loan and Pitsianis 1993), the block of a layer
that each sample uses once is Z = U M Vᵀ with a column for every sample,

    u_b = vec(a_b a_bᵀ),    v_b = vec(Σ_draws g_b g_bᵀ),    M = I / samples,

whose inner products are P_bc = (a_b · a_c)² and Q_bc = Σ (g_b · g_c)² over draws. Singular values
of Z and coefficients of its singular vectors follow from P and Q alone. Stored products are
further columns, so that running averages of the operator are exact; a product of sums over
columns, A ⊗ G with vec(A) = U α and vec(G) = V α, is subtracted by M = diag(weights) − α αᵀ.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.curvature.golub_kahan import Triplets
from smallfry.curvature.rows import Rows
from smallfry.curvature.symmetric import quadratic_forms, symmetric_product
from smallfry.curvature.terms import Products

_EPS = torch.finfo(torch.float64).eps
_TINY = torch.finfo(torch.float64).tiny
POWER_STEPS = 8  # before a Krylov space is worth its operations


class Columns(NamedTuple):
    """Z = U (diag(weights) − α αᵀ) Vᵀ by its Gram matrices; a ``golub_kahan.Map``."""

    left: Tensor  # P = UᵀU, (groups, columns, columns), float64
    right: Tensor  # Q = VᵀV
    weights: Tensor  # (columns,), float64
    downdate: Tensor | None  # α, (columns,)

    @property
    def cancelled(self) -> float:
        """Relative error of a norm, the root of a sum with cancellation."""
        return math.sqrt(10 * _EPS)

    def left_bound(self, x: Tensor) -> Tensor:
        """Bound xᵀ P x by columns times Σ x_i² P_ii."""
        return _bound(x, self.left)

    def right_bound(self, x: Tensor) -> Tensor:
        """Bound xᵀ Q x by columns times Σ x_i² Q_ii."""
        return _bound(x, self.right)

    def apply(self, dual: Tensor) -> Tensor:
        """Compute M x."""
        result = dual * self.weights
        if self.downdate is None:
            return result
        return result - (dual @ self.downdate)[..., None] * self.downdate

    def adjoint(self, dual: Tensor) -> Tensor:
        """Compute M x, as M is symmetric."""
        return self.apply(dual)

    def left_metric(self, x: Tensor) -> Tensor:
        """Compute x P."""
        return x @ self.left

    def right_metric(self, x: Tensor) -> Tensor:
        """Compute x Q."""
        return x @ self.right

    @property
    def is_positive(self) -> bool:
        """True if a leading pair of positive vectors is expected (Perron and Frobenius)."""
        return self.downdate is None and bool((self.weights >= 0).all())

    def squared_norm(self) -> Tensor:
        """Compute ‖Z‖² = tr(M P M Q), (groups,)."""
        return (self.apply(self.left).transpose(1, 2) * self.apply(self.right)).sum((1, 2))


def columns(
    rows: Rows, share: float, stored: Products | None, weights: Tensor, downdate: Tensor | None
) -> Columns:
    """Build the columns of ``share`` F + Σ weights_k R_k ⊗ S_k − A ⊗ G.

    Args:
        rows: With one use per sample.
        share: Weight of the batch's own Fisher.
        stored: Products R_k ⊗ S_k, the last columns.
        weights: (stored,), float64, of any sign.
        downdate: (1 + stored,), float64: α of each sample, the same for all, and of each stored
            product; None to subtract nothing.
    """
    draws, samples = rows.gradients.shape[1], rows.samples
    a, g = rows.inputs[:, :, 0], rows.gradients[:, :, :, 0].flatten(1, 2)
    left, right = grams(rows)
    if stored is not None:
        left = _with_stored(left, a, stored.inputs, 1)
        right = _with_stored(right, g, stored.outputs, draws)
    even = torch.full((samples,), share / samples, dtype=torch.float64, device=a.device)
    if downdate is not None:
        downdate = torch.cat([downdate[:1].expand(samples), downdate[1:]])
    return Columns(left, right, torch.cat([even, weights]), downdate)


def grams(rows: Rows) -> tuple[Tensor, Tensor]:
    """Compute P and Q of the samples alone, (groups, samples, samples), float64; one use each."""
    draws, samples = rows.gradients.shape[1], rows.samples
    a, g = rows.inputs[:, :, 0], rows.gradients[:, :, :, 0].flatten(1, 2)
    left = symmetric_product(a.transpose(1, 2), a.transpose(1, 2)).double().square_()
    right = symmetric_product(g.transpose(1, 2), g.transpose(1, 2)).double().square_()
    if draws > 1:
        right = right.reshape(-1, draws, samples, draws, samples).sum((1, 3))
    return left, right


def bordered(own: Tensor, edge: Tensor, corner: Tensor) -> Tensor:
    """Extend the Gram matrix of samples by stored matrices.

    Args:
        own: Gram matrix of the samples.
        edge: ⟨R, x xᵀ⟩ = xᵀ R x, (groups, stored, samples), float64.
        corner: ⟨R, R'⟩, (groups, stored, stored), float64.
    """
    top = torch.cat([own, edge.transpose(1, 2)], 2)
    return torch.cat([top, torch.cat([edge, corner], 2)], 1)


def factors(x: Tensor, stored: Tensor | None, coefficients: Tensor) -> Tensor:
    """Compute Σ_b c_b x_b x_bᵀ + Σ_k c_k R_k, one matrix per set of coefficients.

    Args:
        x: (groups, draws · samples, size): inputs, or gradients of which draws share coefficients.
        stored: (stored, groups, size, size), or None.
        coefficients: (groups, rank, samples + stored).

    Returns:
        (rank, groups, size, size).
    """
    kept = 0 if stored is None else stored.shape[0]
    samples = coefficients.shape[2] - kept
    c = coefficients.to(x).transpose(0, 1)  # (rank, groups, columns)
    own = c[:, :, :samples].repeat(1, 1, x.shape[1] // samples)
    size = x.shape[2]
    result = x.new_empty(len(own), len(x), size, size)
    for target, one in zip(result, own, strict=True):
        symmetric_product(x * one[:, :, None], x, target)
    for k in range(kept):
        assert stored is not None
        result.addcmul_(stored[k], c[:, :, samples + k, None, None])
    return result


def positive_triplet(problem: Columns, start: Tensor, tolerance: float) -> Triplets | None:
    """Find the leading triplet of a positive map by power iteration; None if it converges slowly.

    From positive vectors on it takes a few steps where the leading value stands out, and each is
    two small products, where bidiagonalisation has many operations on few numbers. Coefficients
    are those of ``canonical_triplets``.

    Args:
        problem: With ``is_positive``.
        start: (groups, 1, columns), of the right vector, not negative.
        tolerance: On ‖Zᵀu − σv‖ / σ; differences of squares resolve it down to 1e-7.
    """
    e, q = start, problem.right_metric(start)
    for _ in range(POWER_STEPS):
        length = (e * q).sum(2, keepdim=True).sqrt().clamp_min(_TINY)
        c = problem.apply(q / length)
        p = problem.left_metric(c)
        value = (c * p).sum(2, keepdim=True).sqrt()
        scale = value.clamp_min(_TINY)
        image = problem.apply(p / scale)
        along = problem.right_metric(image)
        squared = (image * (along - 2 * value * q / length)).sum(2, keepdim=True) + value**2
        e, q = image, along
        if bool((squared <= (tolerance * value) ** 2).all()):
            residual = float((squared.clamp_min(0).sqrt() / scale).max())
            return Triplets(value[:, :, 0], c / scale, image / scale, residual)
    return None


def full_triplets(problem: Columns, rank: int) -> Triplets:
    """Compute the leading triplets by complete eigendecompositions of P and Q.

    With P = L_P L_Pᵀ and Q = L_Q L_Qᵀ the triplets are those of L_Pᵀ M L_Q, and the coefficients
    of its singular vectors follow without an inverse: c = M L_Q y / σ, e = M L_P x / σ. Squares
    hide what is below 1e-7 σ₁: it is rounding, or zero.
    """
    roots = []
    for matrix in (problem.left, problem.right):
        values, vectors = torch.linalg.eigh(matrix)
        rounding = values[:, -1:] * values.shape[1] * _EPS
        values = torch.where(values > rounding, values, 0.0)
        roots.append((vectors * values.sqrt()[:, None]).transpose(1, 2))  # Lᵀ
    x, values, yt = torch.linalg.svd(roots[0] @ problem.apply(roots[1]).transpose(1, 2))
    some = values > (values[:, :1] * values.shape[1] * _EPS).clamp_min(_TINY)
    inverse = torch.where(some, 1 / values.clamp_min(_TINY), 0.0)[:, :, None]
    c = problem.apply(yt @ roots[1]) * inverse
    e = problem.apply(x.transpose(1, 2) @ roots[0]) * inverse
    values = torch.where(some, values, 0.0)
    return Triplets(values, c, e, 0.0).leading(rank)


def canonical_triplets(problem: Columns, found: Triplets) -> Triplets:
    """Normalise triplets to the coefficients c = M Q e / σ and e = M P c / σ.

    Others stand for the same vectors where columns depend on one another; these are the small
    ones, and not negative for a positive pair. Values below 1e-7 σ₁ are rounding, and made zero.
    """
    values = found.values
    some = values > 1e-7 * values[:, :1].clamp_min(_TINY)
    inverse = torch.where(some, 1 / values.clamp_min(_TINY), 0.0)[:, :, None]
    c = problem.apply(problem.right_metric(found.right)) * inverse
    e = problem.apply(problem.left_metric(found.left)) * inverse
    return Triplets(torch.where(some, values, 0.0), c, e, found.residual)


def _bound(x: Tensor, gram: Tensor) -> Tensor:
    diagonal = gram.diagonal(dim1=1, dim2=2).clamp_min(0)
    return (x**2 * diagonal[:, None]).sum(2).mul(x.shape[2]).sqrt()


def _with_stored(own: Tensor, x: Tensor, stored: Tensor, draws: int) -> Tensor:
    forms = [quadratic_forms(x, matrix).reshape(len(x), draws, -1).sum(1) for matrix in stored]
    flat = stored.flatten(2).transpose(0, 1)
    return bordered(own, torch.stack(forms, 1).double(), (flat @ flat.transpose(1, 2)).double())
