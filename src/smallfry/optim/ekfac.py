"""EKFAC: the exact diagonal of the Fisher in KFAC's eigenbasis (George et al. 2018, 1806.03884).

F ≈ (Q_A ⊗ Q_G) diag(s) (Q_A ⊗ Q_G)ᵀ with Q_A, Q_G from A and G and s the second moments of the
samples' gradients there: never farther from F than A ⊗ G, whatever its scale. With sharing
"exact" s is that of a sample's whole gradient, summed over uses, so that a recursive layer's
curvature has its true size. The basis is made anew with the inverse, s with the statistics. In the
basis of the nearest Kronecker product (KPSVD) it is nearer still.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import (
    basis_second_moments,
    diagonal_error,
    eigendecompose,
    reduced,
    rotate_second_moments,
    solve_diagonal,
    unpack,
)
from smallfry.errors import UsageError
from smallfry.optim.approximation import Approximation, State, eigenvalue_range
from smallfry.optim.base import NaturalGradient
from smallfry.optim.kfac import KroneckerProduct, running
from smallfry.optim.kpsvd import NearestProduct

Sharing = Literal["exact", "expand", "reduce"]


class EKFAC(NaturalGradient):
    """Natural gradient with a diagonal in KFAC's eigenbasis.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        sharing: Of a weight's uses in s: "exact" sums each sample's gradient first, "expand"
            treats uses as samples, "reduce" averages inputs; for all layers or by layer name.
            The basis is that of "reduce" there, and of "expand" otherwise.
        basis: "kfac" for that of A ⊗ G, "kpsvd" for that of the nearest Kronecker product.
        settings: Those of ``NaturalGradient``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        sharing: Sharing | dict[str, Sharing] = "exact",
        basis: Literal["kfac", "kpsvd"] = "kfac",
        **settings: Any,
    ) -> None:
        super().__init__(model, lr, DiagonalInBasis(sharing, basis), **settings)


class DiagonalInBasis(Approximation):
    """(Q_A ⊗ Q_G) diag(s) (Q_A ⊗ Q_G)ᵀ; the arguments are those of ``EKFAC``."""

    sharing_choices = ("exact", "expand", "reduce")
    settles = True

    def __init__(self, sharing: str | Mapping[str, str] = "exact", basis: str = "kfac") -> None:
        super().__init__(sharing)
        if basis not in ("kfac", "kpsvd"):
            raise UsageError(f"basis is 'kfac' or 'kpsvd', not '{basis}'")
        self.basis = basis
        self.product: KroneckerProduct
        if basis == "kpsvd":
            self.product = NearestProduct("factored", sharing, None)
        else:
            self.product = KroneckerProduct("factored", _as_kfac(sharing), None)

    def settings(self) -> dict[str, Any]:
        """Plain data that a saved state depends on."""
        return super().settings() | {"basis": self.basis}

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Average the batch's product in."""
        self.product.update(block, state, rows, keep, generator)

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Decompose A and G, and carry s over to the new basis."""
        qa = eigendecompose(unpack(state["a"])).vectors
        qg = eigendecompose(unpack(state["g"])).vectors
        if "s" in state:
            ua, ug = qa.transpose(1, 2) @ state["qa"], qg.transpose(1, 2) @ state["qg"]
            state["s"] = rotate_second_moments(state["s"], ua, ug)
        state["qa"], state["qg"] = qa, qg
        return 1.0

    def settle(self, block: Block, state: State, rows: Sequence[Rows], keep: float) -> None:
        """Average the batch's second moments in."""
        if "qa" not in state:
            return
        samples = sum(part.samples for part in rows)
        fresh: Any = 0
        for part in rows:
            seen = _as_samples(part, self.sharing_of(block))
            moments = basis_second_moments(seen, state["qa"], state["qg"])
            fresh = fresh + moments * (seen.samples / part.samples) * (part.samples / samples)
        state["s"] = running(state, "s", fresh, keep)

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Into the basis, divide, and back."""
        return solve_diagonal(state["qa"], state["qg"], state["s"], matrix, damping)

    def trace(self, block: Block, state: State) -> float:
        """Σ s."""
        if "s" in state:
            return float(state["s"].double().sum())
        return self.product.trace(block, state)

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """The approximation in words, numbers kept, multiply-adds of an inversion."""
        groups, outputs, inputs = block.shape
        squares = inputs**2 + outputs**2
        packed = (inputs * (inputs + 1) + outputs * (outputs + 1)) // 2
        work = 9 * (inputs**3 + outputs**3)
        words = f"diagonal in the basis of {self.product.words}, {self.sharing_of(block)}"
        return words, groups * (packed + squares + outputs * inputs), groups * work

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """Those whose eigenvectors are the basis."""
        return self.product.factors(state)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Eigenvalue ranges and the Fisher error."""
        a, g = unpack(state["a"]), unpack(state["g"])
        found: dict[str, Any] = {"inputs": eigenvalue_range(a), "outputs": eigenvalue_range(g)}
        if rows:
            basis = [state[key].double() for key in ("qa", "qg", "s")]
            found["fisher_error"] = diagonal_error(rows[0].double(), *basis)
        return found


def _as_samples(rows: Rows, sharing: str) -> Rows:
    """Rows whose samples are what ``sharing`` takes for one gradient."""
    if rows.uses == 1 or sharing == "exact":
        return rows
    if sharing == "reduce":
        return reduced(rows)
    g = rows.gradients.flatten(2, 3).unsqueeze(3)
    return Rows(rows.inputs.flatten(1, 2).unsqueeze(2), g)


def _as_kfac(sharing: str | Mapping[str, str]) -> str | dict[str, str]:
    """The ways of KFAC nearest to those of a diagonal."""
    if isinstance(sharing, str):
        return "expand" if sharing == "exact" else sharing
    return {name: "expand" if way == "exact" else way for name, way in sharing.items()}
