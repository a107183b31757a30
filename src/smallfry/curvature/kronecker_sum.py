"""Inverses of a sum of Kronecker products, M = A ⊗ B + C ⊗ D or Σ R_k ⊗ S_k + λ I.

With A = L Lᵀ and the symmetric eigenproblem L⁻¹ C L⁻ᵀ = E₁ diag(s₁) E₁ᵀ, K₁ = L⁻ᵀ E₁ has
K₁ᵀ A K₁ = I and K₁ᵀ C K₁ = diag(s₁), and likewise K₂ of B and D, so that

    M⁻¹ X = K₂ [(K₂ᵀ X K₁) / (1 + s₂ s₁ᵀ)] K₁ᵀ.

A sum of two nearest products is indefinite in general: 1 + s₂ s₁ᵀ may be negative. It is the
product that is clamped, at a small positive floor: the inverse is then positive definite always,
and exact wherever that is safe. (Taking absolute values of s₁ and s₂ instead turns every negative
part of the correction into a positive one.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.curvature.kronecker import Eigen, NotFiniteError, eigendecompose, solve_tikhonov
from smallfry.curvature.terms import Terms


class FactoredSum(NamedTuple):
    """Factorisation of A ⊗ B + C ⊗ D for solves."""

    k1: Tensor  # K₁, (groups, inputs, inputs)
    k2: Tensor  # K₂, (groups, outputs, outputs)
    s1: Tensor  # (groups, inputs)
    s2: Tensor  # (groups, outputs)
    floor: float  # 1 + s₂ s₁ᵀ is not taken for less

    @property
    def smallest(self) -> float:
        """Smallest 1 + s₂ s₁ᵀ before clamping; the clamp is active if the floor exceeds it."""
        ends = [torch.stack([s.amin(1), s.amax(1)], 1) for s in (self.s1, self.s2)]
        return float((1 + ends[0][:, :, None] * ends[1][:, None]).min())


class Iterations(NamedTuple):
    """Residual and iteration count of conjugate gradients."""

    solution: Tensor  # (groups, outputs, inputs)
    steps: int
    residual: float  # ‖X − M solution‖ / ‖X‖
    indefinite: bool  # whether negative curvature ended them


def factor_sum(a: Tensor, b: Tensor, c: Tensor, d: Tensor, floor: float = 0.05) -> FactoredSum:
    """Factor A ⊗ B + C ⊗ D.

    Args:
        a: (groups, inputs, inputs), positive definite: damped already.
        b: (groups, outputs, outputs), positive definite: damped already.
        c: (groups, inputs, inputs), symmetric; zeros for a single product.
        d: (groups, outputs, outputs), symmetric.
        floor: Smallest 1 + s₂ s₁ᵀ, positive and at most 1.

    Raises:
        NotFiniteError: A matrix is not finite, or can't be factored.
    """
    k1, s1 = _diagonalized(a, c)
    k2, s2 = _diagonalized(b, d)
    return FactoredSum(k1, k2, s1, s2, floor)


def solve_sum(factored: FactoredSum, x: Tensor) -> Tensor:
    """Compute M⁻¹ X with the clamped M; symmetric and positive definite as a map of X.

    Args:
        factored: From ``factor_sum``.
        x: (groups, outputs, inputs).
    """
    k1, k2, s1, s2, floor = factored
    rotated = k2.transpose(1, 2) @ x @ k1
    rotated = rotated / (1 + s2[:, :, None] * s1[:, None]).clamp_min(floor)
    return k2 @ rotated @ k1.transpose(1, 2)


def sum_product(terms: Terms, x: Tensor, damping: Tensor | float) -> Tensor:
    """Compute Σ S_k X R_k + λ X."""
    result = x * damping
    for r, s in zip(terms.inputs, terms.outputs, strict=True):
        result = result + s @ x @ r
    return result


def first_pair(terms: Terms) -> tuple[Eigen, Eigen]:
    """Eigendecompose the first pair, the preconditioner of ``solve_sum_pcg``."""
    return eigendecompose(terms.inputs[0]), eigendecompose(terms.outputs[0])


def solve_sum_pcg(
    terms: Terms,
    x: Tensor,
    damping: float,
    pair: tuple[Eigen, Eigen] | None = None,
    tolerance: float = 1e-3,
    steps: int = 30,
) -> Iterations:
    """Compute (Σ R_k ⊗ S_k + λ I)⁻¹ X by conjugate gradients; groups form one block diagonal.

    Preconditioned with the first pair and the whole λ, exactly inverted. Where the sum is
    indefinite, it ends with what it has before a direction of negative curvature; the solution
    lies uphill of the gradient X always: ⟨X, solution⟩ > 0.

    Args:
        terms: With the first pair positive semi-definite.
        x: (groups, outputs, inputs).
        damping: λ, positive.
        pair: From ``first_pair``, to be kept between calls; made here if None.
        tolerance: On ‖X − M solution‖ / ‖X‖.
        steps: At most.
    """
    eigen_a, eigen_g = first_pair(terms) if pair is None else pair
    solution = torch.zeros_like(x)
    residual, size = x, float(x.norm())
    if size == 0:
        return Iterations(solution, 0, 0.0, False)
    solved = solve_tikhonov(eigen_a, eigen_g, residual, damping)
    direction = solved
    slope = (residual * solved).sum()
    for step in range(steps):
        image = sum_product(terms, direction, damping)
        curvature = (direction * image).sum()
        if not bool(curvature > 0):
            # without a step there is the preconditioner's, which is a descent direction
            solution = solved if step == 0 else solution
            left = float((x - sum_product(terms, solution, damping)).norm()) / size
            return Iterations(solution, step, left, True)
        length = slope / curvature
        solution = solution + length * direction
        residual = residual - length * image
        left = float(residual.norm()) / size
        if left <= tolerance:
            return Iterations(solution, step + 1, left, False)
        solved = solve_tikhonov(eigen_a, eigen_g, residual, damping)
        before, slope = slope, (residual * solved).sum()
        direction = solved + slope / before * direction
    return Iterations(solution, steps, left, False)


def _diagonalized(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Compute K and s with Kᵀ A K = I and Kᵀ C K = diag(s)."""
    if not bool(a.isfinite().all()) or not bool(c.isfinite().all()):
        raise NotFiniteError("a Kronecker factor is not finite")
    if not bool(c.any()):
        return _inverse_root(a, a.dtype), torch.zeros_like(a[:, 0])
    for precision in dict.fromkeys((a.dtype, torch.float64)):
        root = _inverse_root(a, precision)  # Wᵀ A W = I
        middle = root.transpose(1, 2) @ c.to(precision) @ root
        middle = (middle + middle.transpose(1, 2)) / 2
        size = middle.abs().amax((1, 2))[:, None, None].clamp_min(torch.finfo(precision).tiny)
        try:
            values, vectors = torch.linalg.eigh(middle / size)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return (root @ vectors).to(a), (values * size[:, 0]).to(a)
    raise NotFiniteError("a sum of Kronecker products can't be diagonalized, even in float64")


def _inverse_root(a: Tensor, precision: torch.dtype) -> Tensor:
    """Compute W with Wᵀ A W = I: L⁻ᵀ, or by eigenvectors where rounding made A indefinite."""
    matrix = a.to(precision)
    lower, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        identity = torch.eye(a.shape[1], dtype=precision, device=a.device).expand_as(matrix)
        root: Tensor = torch.linalg.solve_triangular(lower.transpose(1, 2), identity, upper=True)
        if bool(root.isfinite().all()):
            return root
    values, vectors = eigendecompose(matrix)
    smallest = values[:, -1:] * torch.finfo(precision).eps * a.shape[1]
    floor = smallest.clamp_min(torch.finfo(precision).tiny ** 0.5)
    weights: Tensor = values.clamp_min(floor).rsqrt()
    return vectors * weights[:, None]
