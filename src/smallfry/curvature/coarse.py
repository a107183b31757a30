"""Coarse level of two-level methods, which couples the blocks of a block-diagonal solution.

Let F• = F + λ I of the whole network, u the gradient and z₁ a fine solution, block by block. With
few vectors as the rows of R₀, the coarse problem is to find β that minimises the energy

    𝔈(β) = ½ ‖z₁ + R₀ᵀ β − F•⁻¹ u‖²  in the norm of F•,
    β = F_c⁻¹ R₀ r,    F_c = R₀ F• R₀ᵀ,    r = u − F• z₁         (residual form)

which never raises it: 𝔈(β) − 𝔈(0) = −½ (R₀ r)ᵀ F_c⁻¹ (R₀ r). The additive form β = F_c⁻¹ R₀ u of
Tselepidis, Kohler and Orvieto 2020 (arXiv 2011.00573) may raise it. Two-level KFAC is that of
Koroko et al. 2023 (arXiv 2303.18083). With Y = J R₀ᵀ from one pass over the blocks everything else
is as small as there are rows; F is never formed, and blocks are coupled.

A vector is a mapping from blocks to matrices (groups, outputs, inputs), zero on blocks that are not
in it; a coarse basis is a list of vectors, usually of one block each.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from smallfry.curvature.fisher import combine, projections
from smallfry.curvature.kronecker import Eigen, NotFiniteError
from smallfry.curvature.rows import Rows

K = TypeVar("K", bound=Hashable)
Preconditioner = Callable[[K, Tensor], Tensor]


class FineLevel(NamedTuple, Generic[K]):
    """Fine solution with its right-hand side and operator."""

    rows: Mapping[K, Rows]
    gradient: Mapping[K, Tensor]  # u
    solution: Mapping[K, Tensor]  # z₁
    damping: Mapping[K, float]  # λ of each block
    image: Tensor  # J z₁, (draws · samples,), float64


class Correction(NamedTuple, Generic[K]):
    """Coarse-level correction of the fine solution."""

    vector: dict[K, Tensor]  # R₀ᵀ β
    image: Tensor  # J R₀ᵀ β, (draws · samples,), float64
    coefficients: Tensor  # β, (rows of R₀,), float64
    energy: float  # 𝔈(β) − 𝔈(0)
    dropped: int  # rows that depend on others


def fine_level(
    rows: Mapping[K, Rows],
    gradient: Mapping[K, Tensor],
    solution: Mapping[K, Tensor],
    damping: Mapping[K, float] | float,
) -> FineLevel[K]:
    """Gather the inputs of the coarse solve.

    Args:
        rows: Rows of the blocks, from one batch.
        gradient: u, a matrix for each block.
        solution: z₁, a matrix for each block.
        damping: λ, positive: of each block, or of all.
    """
    if not isinstance(damping, Mapping):
        damping = dict.fromkeys(rows, damping)
    image = sum(projections(rows[key], solution[key]).double() for key in rows)
    assert isinstance(image, Tensor)
    return FineLevel(rows, gradient, solution, damping, image)


def residual(level: FineLevel[K]) -> dict[K, Tensor]:
    """Compute r = u − F• z₁."""
    result = {}
    for key, rows in level.rows.items():
        z = level.solution[key]
        product = combine(rows, level.image.to(z.dtype)) / rows.samples
        result[key] = level.gradient[key] - product - level.damping[key] * z
    return result


def coarse_correction(
    level: FineLevel[K],
    basis: Sequence[Mapping[K, Tensor]],
    form: Literal["residual", "additive"] = "residual",
) -> Correction[K]:
    """Solve the coarse problem.

    Rows that depend on others, up to the precision, are left out: the space is what
    counts, so that neither the length of a row nor a row too many changes the result.

    Args:
        level: From ``fine_level``.
        basis: Rows of R₀.
        form: "residual" minimises the energy; "additive" has the gradient on its right-hand side.

    Raises:
        NotFiniteError: A row, the gradient or the solution is not finite.
    """
    forward = torch.stack([_image(level, row) for row in basis], 1)  # Y, (draws · samples, rows)
    samples = next(iter(level.rows.values())).samples
    right, damped = torch.zeros_like(forward[0]), torch.zeros_like(forward[0])
    matrix = forward.T @ forward / samples
    for key, weight in level.damping.items():
        members = [(i, row[key]) for i, row in enumerate(basis) if key in row]
        for number, (i, part) in enumerate(members):
            right[i] += _dot(part, level.gradient[key])
            damped[i] += weight * _dot(part, level.solution[key])
            for j, other in members[: number + 1]:
                term = weight * _dot(part, other)
                matrix[i, j] += term
                if j != i:
                    matrix[j, i] += term
    left = right - forward.T @ level.image / samples - damped  # R₀ r
    if not bool(matrix.isfinite().all()) or not bool(left.isfinite().all()):
        raise NotFiniteError("a coarse system is not finite")
    dtype = next(iter(level.gradient.values())).dtype
    kept, solve = _independent(matrix, 10 * len(basis) * torch.finfo(dtype).eps)
    beta = torch.zeros_like(left)
    beta[kept] = solve((left if form == "residual" else right)[kept])
    vector: dict[K, Tensor] = {}
    for weight, row in zip(beta.tolist(), basis, strict=True):
        for key, part in row.items() if weight else ():
            vector[key] = vector[key] + weight * part if key in vector else weight * part
    energy = float(beta @ matrix @ beta / 2 - beta @ left)
    return Correction(vector, forward @ beta, beta, energy, len(basis) - len(kept))


def split(vector: Mapping[K, Tensor]) -> list[dict[K, Tensor]]:
    """Split a vector into one row per block: z₁, the gradient or the previous step as a space."""
    return [{key: part} for key, part in vector.items()]


def nicolaides(like: Mapping[K, Tensor]) -> list[dict[K, Tensor]]:
    """Build the space of ones on each block."""
    return [{key: torch.ones_like(part)} for key, part in like.items()]


def spectral(eigen: Mapping[K, tuple[Eigen, Eigen]]) -> list[dict[K, Tensor]]:
    """Build the eigenvectors of A ⊗ G with the smallest eigenvalue, one per block.

    Args:
        eigen: Decompositions of A and of G, ascending as from ``kronecker.eigendecompose``.
    """
    rows = []
    for key, (a, g) in eigen.items():
        group = int((a.values[:, 0] * g.values[:, 0]).argmin())
        row = a.vectors.new_zeros(len(a.vectors), g.vectors.shape[1], a.vectors.shape[1])
        row[group] = g.vectors[group, :, 0].outer(a.vectors[group, :, 0])
        rows.append({key: row})
    return rows


def preconditioned(
    vector: Mapping[K, Tensor], precondition: Preconditioner[K]
) -> list[dict[K, Tensor]]:
    """Build M⁻¹ of a vector with one row per block; for r, this is the residual space.

    Args:
        vector: A matrix for each block.
        precondition: M⁻¹ of a block.
    """
    return [{key: precondition(key, part)} for key, part in vector.items()]


def krylov(
    basis: Sequence[Mapping[K, Tensor]], precondition: Preconditioner[K]
) -> list[Mapping[K, Tensor]]:
    """Extend a basis by M⁻¹ of each of its rows."""
    more = [{key: precondition(key, part) for key, part in row.items()} for row in basis]
    return [*basis, *more]


def _image(level: FineLevel[K], row: Mapping[K, Tensor]) -> Tensor:
    """Apply J to a row, (draws · samples,), float64."""
    total = torch.zeros_like(level.image)
    for key, part in row.items():
        if key in level.rows:
            total += projections(level.rows[key], part).double()
    return total


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return torch.dot(first.reshape(-1), second.reshape(-1)).double()


def _independent(matrix: Tensor, tolerance: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Select linearly independent rows, and factor their part of a symmetric matrix.

    Rows are scaled to unit length first. Where plain Cholesky meets a small pivot, a pivoted one
    takes the rows that add most, and leaves those that add less than ``tolerance``.
    """
    length = matrix.diagonal().clamp_min(0).sqrt()
    kept = (length > 0).nonzero()[:, 0]

    def scaled() -> Tensor:
        return matrix[kept][:, kept] / (length[kept, None] * length[kept])

    lower, info = torch.linalg.cholesky_ex(scaled())
    if len(kept) and (bool(info) or bool(lower.diagonal().square().min() <= tolerance)):
        kept = kept[_pivots(scaled(), tolerance)]
        lower = torch.linalg.cholesky(scaled())

    def solve(right: Tensor) -> Tensor:
        by = length[kept]
        return torch.cholesky_solve((right / by)[:, None], lower)[:, 0] / by

    return kept, solve


def _pivots(matrix: Tensor, tolerance: float) -> Tensor:
    """Order rows by pivoted Cholesky, as long as a pivot is above the tolerance."""
    left = matrix.diagonal().clone()
    lower = matrix.new_zeros(len(matrix), 0)
    order: list[int] = []
    for _ in range(len(matrix)):
        pivot = int(left.argmax())
        if float(left[pivot]) <= tolerance:
            break
        column = (matrix[:, pivot] - lower @ lower[pivot]) / left[pivot].sqrt()
        lower = torch.cat([lower, column[:, None]], 1)
        left = left - column**2
        left[pivot] = -torch.inf
        order.append(pivot)
    return torch.tensor(sorted(order), dtype=torch.long, device=matrix.device)
