"""Kronecker factors as a few eigenpairs and one value for the remaining spectrum.

    factor ≈ U diag(λ) Uᵀ + τ (I − U Uᵀ)

The spectrum of a factor falls fast, so that few pairs hold most of it (Puiu 2022, arXiv
2206.15397). τ is the mean of the eigenvalues left out: the trace stays exact, and so do the scales
and damping that are made from it. A running average takes a batch in without ever forming the
factor: two products with the batch's rows, from the old eigenvectors on (subspace iteration with
Rayleigh and Ritz's values, Halko et al. 2011, arXiv 0909.4061), so that a refresh costs
O(rows · size · rank) and a damped solve O(size · rank) for each column.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.curvature.kronecker import NotFiniteError

OVERSAMPLING = 8  # directions beside the rank in which new eigenvectors are looked for


class LowRank(NamedTuple):
    """Symmetric positive semi-definite matrix with a flat tail."""

    vectors: Tensor  # U, (groups, size, rank), orthonormal
    values: Tensor  # λ, (groups, rank), ascending
    tail: Tensor  # τ, (groups,)

    @property
    def trace(self) -> Tensor:
        """(groups,)."""
        _, size, rank = self.vectors.shape
        return self.values.sum(1) + (size - rank) * self.tail

    def dense(self) -> Tensor:
        """Return the dense matrix, (groups, size, size)."""
        size = self.vectors.shape[1]
        excess = (self.values - self.tail[:, None])[:, None]
        flat = self.tail[:, None, None] * torch.eye(size).to(self.vectors)
        return (self.vectors * excess) @ self.vectors.transpose(1, 2) + flat

    def times(self, x: Tensor) -> Tensor:
        """Multiply the matrix by (groups, size, columns)."""
        excess = (self.values - self.tail[:, None])[:, :, None]
        projected = excess * (self.vectors.transpose(1, 2) @ x)
        return self.vectors @ projected + self.tail[:, None, None] * x


def inner(one: LowRank, other: LowRank) -> Tensor:
    """Compute ⟨one, other⟩, the trace of their product, (groups,)."""
    size = one.vectors.shape[1]
    squares = (one.vectors.transpose(1, 2) @ other.vectors) ** 2
    first, second = one.values - one.tail[:, None], other.values - other.tail[:, None]
    coupled = (first[:, None] @ squares @ second[:, :, None]).flatten()
    flat = other.tail * first.sum(1) + one.tail * second.sum(1) + size * one.tail * other.tail
    return coupled + flat


class Average(NamedTuple):
    """Leading pairs of keep · old + (1 − keep) · rowsᵀ rows, in steps between sums over processes.

    The rows (groups, rows, size) are weighted so that rowsᵀ rows is the batch's factor.
    """

    old: LowRank | None
    keep: float  # share of the old
    rank: int

    def directions(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the initial directions of the eigenvector search, (groups, size, columns)."""
        groups, _, size = rows.shape
        start = None if self.old is None else self.old.vectors
        return _directions(groups, size, self.rank, start, generator, rows)

    def basis(self, first: Tensor, product: Tensor) -> Tensor:
        """Orthonormalise the image of the first directions.

        Args:
            first: The directions.
            product: rowsᵀ rows times them.
        """
        return _basis(self._whole(first, product))

    def pairs(self, basis: Tensor, product: Tensor, trace: Tensor) -> LowRank:
        """Compute the leading pairs.

        Args:
            basis: From ``basis``.
            product: rowsᵀ rows times it.
            trace: Trace of rowsᵀ rows, (groups,).
        """
        total = trace if self.old is None else trace * (1 - self.keep) + self.keep * self.old.trace
        return _pairs(basis, self._whole(basis, product), total, self.rank)

    def _whole(self, x: Tensor, product: Tensor) -> Tensor:
        if self.old is None:
            return product
        return (1 - self.keep) * product + self.keep * self.old.times(x)


def gram_times(rows: Tensor, x: Tensor) -> Tensor:
    """Compute rowsᵀ rows times x, (groups, size, columns)."""
    return rows.transpose(1, 2) @ (rows @ x)


def compress(
    matrix: Tensor,
    rank: int,
    generator: torch.Generator,
    near: LowRank | None = None,
    signed: bool = False,
) -> LowRank:
    """Compute the leading ``rank`` pairs of a symmetric matrix, or all.

    Args:
        matrix: (groups, size, size), positive semi-definite unless ``signed``.
        rank: Pairs to keep.
        generator: Generator of the initial directions of the eigenvector search.
        near: A matrix that has almost the same leading eigenvectors.
        signed: Keep the largest by size, whatever their sign, and nothing of the rest.

    Raises:
        NotFiniteError: The matrix is not finite.
    """
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    if matrix.shape[1] <= rank:
        values, vectors = _eigh(matrix)
        return LowRank(vectors, values if signed else values.clamp_min(0), torch.zeros_like(trace))
    start = None if near is None else near.vectors
    return leading_pairs(
        lambda x: matrix @ x, trace, matrix.shape[2], rank, start, generator, signed
    )


def leading_pairs(
    product: Callable[[Tensor], Tensor],
    trace: Tensor,
    size: int,
    rank: int,
    start: Tensor | None,
    generator: torch.Generator,
    signed: bool = False,
) -> LowRank:
    """Compute the leading pairs of a symmetric matrix given by its products.

    Args:
        product: The matrix times (groups, size, columns).
        trace: Trace of the matrix, (groups,).
        size: Its size.
        rank: Pairs to keep, less than size.
        start: Vectors near the leading ones, (groups, size, any); None for random ones.
        generator: Generator of additional random directions.
        signed: Keep the largest by size, whatever their sign, and nothing of the rest.
    """
    first = _directions(len(trace), size, rank, start, generator, trace)
    basis = _basis(product(first))
    return _pairs(basis, product(basis), trace, rank, signed)


def _directions(
    groups: int,
    size: int,
    rank: int,
    start: Tensor | None,
    generator: torch.Generator,
    like: Tensor,
) -> Tensor:
    new = min(OVERSAMPLING if start is not None else rank + OVERSAMPLING, size)
    probes = torch.randn(
        (groups, size, new), generator=generator, device=like.device, dtype=like.dtype
    )
    return probes if start is None else torch.cat([start, probes], dim=2)[..., :size]


def _basis(product: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(product).Q
    return basis


def _pairs(
    basis: Tensor, product: Tensor, trace: Tensor, rank: int, signed: bool = False
) -> LowRank:
    """Compute Rayleigh–Ritz pairs in a basis."""
    ritz = basis.transpose(1, 2) @ product
    values, inner = _eigh((ritz + ritz.transpose(1, 2)) / 2)
    if signed:
        order = values.abs().argsort(1)[:, -rank:]
        values = values.gather(1, order)
        inner = inner.gather(2, order[:, None].expand(-1, inner.shape[1], -1))
        return LowRank(basis @ inner, values, torch.zeros_like(trace))
    values = values[:, -rank:].clamp_min(0)
    tail = ((trace - values.sum(1)) / (basis.shape[1] - rank)).clamp_min(0)
    return LowRank(basis @ inner[..., -rank:], values, tail)


class PencilSide(NamedTuple):
    """One side of A ⊗ B + C ⊗ D: A^{-1/2} C A^{-1/2} = E diag(s) Eᵀ, with A already damped."""

    root: LowRank  # A^{-1/2}
    vectors: Tensor  # E, (groups, size, pairs), orthonormal
    values: Tensor  # s, (groups, pairs)


def pencil_side(a: LowRank, damping: Tensor, c: LowRank) -> PencilSide:
    """Diagonalise C in the metric of A + d I.

    Args:
        a: A.
        damping: d, (groups,).
        c: C, with any signs and no tail.
    """
    root = LowRank(a.vectors, (a.values + damping[:, None]).rsqrt(), (a.tail + damping).rsqrt())
    q, r = torch.linalg.qr(root.times(c.vectors))
    values, inner = _eigh((r * c.values[:, None]) @ r.transpose(1, 2))
    return PencilSide(root, q @ inner, values)


def solve_pencil(a: PencilSide, g: PencilSide, x: Tensor, floor: float) -> Tensor:
    """Compute (A ⊗ B + C ⊗ D)⁻¹ X, with 1 + s_g s_aᵀ clamped at ``floor``.

    Args:
        a: Side of the inputs, of A and C.
        g: Side of the outputs, of B and D.
        x: (groups, outputs, inputs).
        floor: Positive: makes the inverse positive definite.
    """
    y = g.root.times(x)
    y = a.root.times(y.transpose(1, 2)).transpose(1, 2)
    inner = g.vectors.transpose(1, 2) @ y @ a.vectors
    inner = inner * (1 / (1 + g.values[:, :, None] * a.values[:, None]).clamp_min(floor) - 1)
    y = y + g.vectors @ inner @ a.vectors.transpose(1, 2)
    y = g.root.times(y)
    return a.root.times(y.transpose(1, 2)).transpose(1, 2)


def solve_sides(a: LowRank | None, g: LowRank | None, x: Tensor, da: Tensor, dg: Tensor) -> Tensor:
    """Compute (G + d_g I)⁻¹ X (A + d_a I)⁻¹, skipping a side that is None.

    Args:
        a: Input factor.
        g: Output factor.
        x: (groups, outputs, inputs).
        da: (groups,), damping of A.
        dg: (groups,), damping of G.
    """
    scale = torch.ones_like(da)
    if a is not None:
        x = torch.baddbmm(x, (x @ a.vectors) * _shrink(a, da)[:, None], a.vectors.transpose(1, 2))
        scale = scale * (a.tail + da)
    if g is not None:
        x = torch.baddbmm(x, g.vectors * _shrink(g, dg)[:, None], g.vectors.transpose(1, 2) @ x)
        scale = scale * (g.tail + dg)
    return x.div_(scale[:, None, None]) if a is not None or g is not None else x


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues and eigenvectors, in float64 where the given precision is not enough."""
    if not bool(matrix.isfinite().all()):
        raise NotFiniteError("a Kronecker factor is not finite")
    for precision in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(precision))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values.to(matrix), vectors.to(matrix)
    raise NotFiniteError("a Kronecker factor can't be decomposed, even in float64")


def _shrink(factor: LowRank, damping: Tensor) -> Tensor:
    """Compute (τ + d) / (λ + d) − 1, (groups, rank), relative to the tail."""
    return (factor.tail + damping)[:, None] / (factor.values + damping[:, None]) - 1
