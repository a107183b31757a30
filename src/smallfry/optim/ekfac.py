"""EKFAC: the exact diagonal of the Fisher in KFAC's eigenbasis (George et al. 2018, 1806.03884).

F ≈ (Q_A ⊗ Q_G) diag(s) (Q_A ⊗ Q_G)ᵀ with Q_A, Q_G from A and G and s the second moments of the
samples' gradients there: never farther from F than A ⊗ G, whatever its scale. With sharing
"exact" s is that of a sample's whole gradient, summed over uses, so that a recursive layer's
curvature has its true size. In the basis of the nearest Kronecker product (KPSVD) it is nearer
still.

Of a large factor only the leading eigenvectors are kept; all other directions are one, with the
mean of their second moments (``curvature/diagonal.py``), so that a step costs thin products only.
Such a basis follows the statistics, as s does; a whole one is made anew with the inverse.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from smallfry.curvature import Block, Rows
from smallfry.curvature.diagonal import (
    basis_second_moments,
    diagonal_error,
    multiplicities,
    overlaps,
    solve_diagonal,
)
from smallfry.curvature.kronecker import eigendecompose, reduced, unpack
from smallfry.errors import UsageError
from smallfry.optim.approximation import Approximation, State, Summed, Updating, running
from smallfry.optim.base import NaturalGradient
from smallfry.optim.kfac import SIDES, KroneckerProduct
from smallfry.optim.kpsvd import NearestProduct
from smallfry.optim.one_hot import OneHotDiagonal, OneHotProduct, sharing_of_rows
from smallfry.optim.settings import Settings

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
        factor_rank: Eigenvectors kept of each factor larger than twice that, beside one value for
            all other directions; None keeps whole bases. Steps and refreshes cost much less with
            it, and the basis follows the statistics at once.
        settings: Those of ``NaturalGradient``.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import EKFAC
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = EKFAC(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        sharing: Sharing | dict[str, Sharing] = "exact",
        basis: Literal["kfac", "kpsvd"] = "kfac",
        factor_rank: int | None = 64,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, lr, DiagonalInBasis(sharing, basis, factor_rank), **settings)


class DiagonalInBasis(Approximation):
    """(Q_A ⊗ Q_G) diag(s) (Q_A ⊗ Q_G)ᵀ; the arguments are those of ``EKFAC``."""

    sharing_choices = ("exact", "expand", "reduce")
    settles = True

    def __init__(
        self,
        sharing: str | Mapping[str, str] = "exact",
        basis: str = "kfac",
        factor_rank: int | None = 64,
    ) -> None:
        super().__init__(sharing)
        if basis not in ("kfac", "kpsvd"):
            raise UsageError(f"basis is 'kfac' or 'kpsvd', not '{basis}'")
        self.basis = basis
        self.product: KroneckerProduct
        if basis == "kpsvd":
            self.product = NearestProduct("factored", sharing, factor_rank)
        else:
            self.product = KroneckerProduct("factored", _as_kfac(sharing), factor_rank)
        self.divides = self.product.divides

    def settings(self) -> dict[str, Any]:
        """Return the settings of a saved state, as plain data."""
        own = {"basis": self.basis, "factor_rank": self.product.factor_rank}
        return super().settings() | own

    def for_one_hot(self) -> Approximation:
        """Return a method with one value per row and eigenvector."""
        product = self.product.for_one_hot()
        assert isinstance(product, OneHotProduct)
        return OneHotDiagonal(product, sharing_of_rows(self.sharing))

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Average in the batch's product, and project s onto the current low-rank basis."""
        before = {key: state[key] for key in VECTORS.values() if key in state}
        self.product.update(block, state, rows, keep, generator)
        _follow(state, before)

    def updating(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        samples: float,
        keep: float,
        generator: torch.Generator,
    ) -> Updating:
        """Run ``update`` in steps, as for the product."""
        before = {key: state[key] for key in VECTORS.values() if key in state}
        yield from self.product.updating(block, state, rows, samples, keep, generator)
        _follow(state, before)

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Decompose the full factors, and project s onto the new basis."""
        whole = [side for side in ("g", "a") if side in state]
        found = {side: eigendecompose(unpack(state[side])).vectors for side in whole}
        for side, vectors in found.items():
            _turn(state, side, vectors, state.get(f"q{side}"))
            state[f"q{side}"] = vectors
        return 1.0

    def moments(
        self, block: Block, state: State, rows: Sequence[Rows], samples: float
    ) -> Tensor | None:
        """Compute the batch's second moments in the basis."""
        if "inverted" not in state:
            return None
        bases = _bases(state)
        entries = [size + (size < whole) for whole, size in (each.shape[1:] for each in bases)]
        fresh = bases[0].new_zeros(block.shape[0], entries[1], entries[0])
        for part in rows:
            seen = _as_samples(part, self.sharing_of(block))
            # a mean over what counts as samples, times how many of them the batch has of each
            fresh = fresh + basis_second_moments(seen, *bases) * (seen.samples / samples)
        return fresh

    def settle(self, state: State, moments: Tensor, keep: float) -> None:
        """Average in the second moments."""
        state["s"] = running(state, "s", moments, keep)

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Project onto the basis, divide, and project back."""
        qa, qg = _bases(state)
        return solve_diagonal(qa, qg, state["s"], matrix, damping)

    def trace(self, block: Block, state: State) -> float:
        """Compute Σ s, weighted by the number of directions."""
        if "s" in state:
            s = state["s"].double()
            return float((s * multiplicities(s, *block.shape[1:])).sum())
        return self.product.trace(block, state)

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the approximation: words, numbers kept, multiply-adds of an inversion."""
        groups, outputs, inputs = block.shape
        kept, work, moments = 0, 0, 1
        for side, size in zip(SIDES, (inputs, outputs), strict=True):
            rank = self.product.rank_of(block, side)
            if rank is None:
                kept, work = kept + size * (size + 1) // 2 + size**2, work + 9 * size**3
            else:
                kept += size * rank + rank + 1
            moments *= size if rank is None else rank + 1
        rank = self.product.factor_rank
        words = f"diagonal in the basis of {self.product.words}, {self.sharing_of(block)}"
        words += "" if rank is None else f", rank {rank}"
        return words, groups * (kept + moments), groups * work

    def summed(self, block: Block) -> Summed | None:
        """Describe the product's sums and the second moments, which the owner projects first."""
        product = self.product.summed(block)
        if product is None:
            return None
        groups, outputs, inputs = block.shape
        kept = [self.product.rank_of(block, side) for side in SIDES]
        entries = [
            size if rank is None else rank + 1
            for size, rank in zip((inputs, outputs), kept, strict=True)
        ]
        moments = groups * entries[0] * entries[1]
        turned = groups * (inputs * entries[0] + outputs * entries[1]) + moments
        return product._replace(
            spread=product.spread + moments,
            everywhere=product.everywhere + moments,
            macs=product.macs + turned,
        )

    def burden(self, block: Block) -> int:
        """Estimate multiply-adds of full or low-rank bases, and of projecting s onto them."""
        groups, outputs, inputs = block.shape
        turning = 0
        for side, size, other in zip(SIDES, (inputs, outputs), (outputs, inputs), strict=True):
            whole = self.product.rank_of(block, side) is None
            turning += size**2 * (size + other) if whole else 0
        return self.cost(block, {})[2] + groups * turning + self.product.burden(block)

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the factors whose eigenvectors are the basis."""
        return self.product.factors(state)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute eigenvalue ranges and the Fisher error."""
        found = self.product.diagnose(block, state, [])
        if rows and "s" in state:
            qa, qg = (vectors.double() for vectors in _bases(state))
            error = diagonal_error(rows[0].double(), qa, qg, state["s"].double())
            found["fisher_error"] = error
        return found


VECTORS = {side: f"vectors_{side}" for side in SIDES}  # of factors that have a rank


def _bases(state: State) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of inputs and outputs, low-rank or full."""
    a, g = (state[key if key in state else f"q{side}"] for side, key in VECTORS.items())
    return a, g


def _follow(state: State, before: State) -> None:
    """Project s onto the basis of an update, if it has one."""
    for side, key in VECTORS.items():
        if key in before and state[key] is not before[key]:
            _turn(state, side, state[key], before[key])


def _turn(state: State, side: str, new: Tensor, old: Tensor | None) -> None:
    """Project s from one side's old vectors onto new ones."""
    if old is not None and "s" in state:
        shares, s = overlaps(new, old), state["s"]
        state["s"] = shares @ s if side == "g" else s @ shares.transpose(1, 2)


def _as_samples(rows: Rows, sharing: str) -> Rows:
    """Split rows into samples: one gradient each, according to ``sharing``."""
    if rows.uses == 1 or sharing == "exact":
        return rows
    if sharing == "reduce":
        return reduced(rows)
    g = rows.gradients.flatten(2, 3).unsqueeze(3)
    return Rows(rows.inputs.flatten(1, 2).unsqueeze(2), g)


def _as_kfac(sharing: str | Mapping[str, str]) -> str | dict[str, str]:
    """Map diagonal sharing modes to the nearest ones of KFAC."""
    if isinstance(sharing, str):
        return "expand" if sharing == "exact" else sharing
    return {name: "expand" if way == "exact" else way for name, way in sharing.items()}
