"""KPSVD: the Kronecker products nearest to a block's Fisher (Koroko et al. 2022, arXiv 2201.10285).

    min ‖F − Σ_k R_k ⊗ S_k‖ over sums of ``rank`` products

KFAC's A ⊗ G assumes that inputs and gradients are independent; these are the products that are
nearest whether they are or not, found exactly (``curvature/kronecker_svd.py``). One product is
positive semi-definite and is inverted as KFAC's. A sum of two is indefinite in general; its inverse
clamps the product of eigenvalues (``curvature/kronecker_sum.py``). Averages over batches are of the
operator, not of factors.

A smaller distance does not by itself make a better step: small eigenvalues hardly count in it, and
they are what a step along them is divided by.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import (
    Eigen,
    pack,
    reduced,
    split_damping,
    unpack,
)
from smallfry.curvature.kronecker_sum import (
    FactoredSum,
    factor_sum,
    first_pair,
    solve_sum,
    solve_sum_pcg,
)
from smallfry.curvature.kronecker_svd import Solver, nearest_terms
from smallfry.curvature.low_rank import compress
from smallfry.curvature.terms import Terms, expanded, joined, terms_error
from smallfry.errors import UsageError
from smallfry.optim.approximation import Approximation, State, eigenvalue_range
from smallfry.optim.base import NaturalGradient
from smallfry.optim.kfac import SIDES, KroneckerProduct, low_rank

Sharing = Literal["exact", "expand", "reduce"]
Inverse = Literal["clamped", "pcg"]


class KPSVD(NaturalGradient):
    """Natural gradient with the nearest sum of Kronecker products.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        rank: Products in the sum.
        sharing: Of a weight's uses: "exact" takes a sample's whole gradient, "expand" treats uses
            as samples, "reduce" averages inputs; for all layers or by layer name.
        damping_split: For one product, as in ``KFAC``.
        factor_rank: For one product, as in ``KFAC``.
        inverse: For two products: "clamped", or "pcg" for conjugate gradients with the exact λ,
            which more than two need.
        settings: Those of ``NaturalGradient``.
    """

    solver: Solver = "deflation"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        rank: int = 1,
        sharing: Sharing | dict[str, Sharing] = "exact",
        damping_split: Literal["factored", "tikhonov"] = "factored",
        factor_rank: int | None = 64,
        inverse: Inverse = "clamped",
        **settings: Any,
    ) -> None:
        approximation: Approximation
        if rank == 1:
            approximation = NearestProduct(damping_split, sharing, factor_rank)
        else:
            approximation = NearestSum(rank, sharing, self.solver, inverse)
        super().__init__(model, lr, approximation, **settings)


class Deflation(KPSVD):
    """The nearest sum of two products, one after the other; arguments as in ``KPSVD``."""

    def __init__(self, model: nn.Module, lr: float = 1e-2, **settings: Any) -> None:
        super().__init__(model, lr, rank=2, **settings)


class Lanczos(Deflation):
    """The same sum as ``Deflation``'s, both products from one Krylov space."""

    solver: Solver = "lanczos"


class NearestProduct(KroneckerProduct):
    """R ⊗ S; the arguments are those of ``KPSVD``."""

    sharing_choices = ("exact", "expand", "reduce")
    words = "nearest R ⊗ S"

    def __init__(
        self,
        damping_split: str = "factored",
        sharing: str | Mapping[str, str] = "exact",
        factor_rank: int | None = 64,
    ) -> None:
        super().__init__(damping_split, sharing, factor_rank)

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """The product nearest to the old one and the batch together."""
        stored = None
        if keep:
            r, s = (self.dense(state, side)[None] for side in SIDES)
            stored = Terms(r, s, *_unknown(r))
        found = nearest_terms(as_used(rows, self.sharing_of(block)), stored=stored, keep=keep)
        fresh: State = {}
        for side, matrix in zip(SIDES, (found.inputs[0], found.outputs[0]), strict=True):
            rank = self.rank_of(block, side)
            if rank is None:
                fresh[side] = pack(matrix)
            else:
                few = compress(matrix, rank, generator, low_rank(state, side))
                fresh |= {f"{name}_{side}": t for name, t in few._asdict().items()}
        state |= fresh


class NearestSum(Approximation):
    """Σ R_k ⊗ S_k; the arguments are those of ``KPSVD``."""

    sharing_choices = ("exact", "expand", "reduce")

    def __init__(
        self,
        rank: int = 2,
        sharing: str | Mapping[str, str] = "exact",
        solver: Solver = "deflation",
        inverse: str = "clamped",
    ) -> None:
        super().__init__(sharing)
        if rank < 1:
            raise UsageError(f"rank is at least 1, not {rank}")
        if inverse not in ("clamped", "pcg"):
            raise UsageError(f"inverse is 'clamped' or 'pcg', not '{inverse}'")
        if rank > 2 and inverse == "clamped":
            raise UsageError(f"a sum of {rank} products is inverted by inverse='pcg' only")
        self.rank, self.solver, self.inverse = rank, solver, inverse

    def settings(self) -> dict[str, Any]:
        """Plain data that a saved state depends on."""
        return super().settings() | {"rank": self.rank, "inverse": self.inverse}

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """The sum nearest to the old one and the batch together."""
        stored = self.terms(state) if keep else None
        seen = as_used(rows, self.sharing_of(block))
        self._keep(
            state, nearest_terms(seen, self.rank, stored=stored, keep=keep, solver=self.solver)
        )

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Factor the sum, its first product damped; or decompose that for conjugate gradients."""
        terms = self.terms(state)
        if self.inverse == "pcg":
            a, g = first_pair(terms)
            state |= {"qa": a.vectors, "la": a.values, "qg": g.vectors, "lg": g.values}
            return 1.0
        r, s = (matrices.clone() for matrices in terms.products)
        mean_r, mean_s = (m[0].diagonal(dim1=1, dim2=2).mean(1) for m in (r, s))
        for matrices, by in zip((r, s), split_damping(mean_r, mean_s, damping), strict=True):
            matrices[0].diagonal(dim1=1, dim2=2).add_(by[:, None])
        factored = factor_sum(r[0], s[0], r[1], s[1])
        state |= {"k1": factored.k1, "k2": factored.k2, "s1": factored.s1, "s2": factored.s2}
        return 1.0

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Into the common eigenbasis and back; or conjugate gradients."""
        if self.inverse == "pcg":
            pair = Eigen(state["la"], state["qa"]), Eigen(state["lg"], state["qg"])
            return solve_sum_pcg(self.terms(state), matrix, damping, pair).solution
        factored = FactoredSum(state["k1"], state["k2"], state["s1"], state["s2"], FLOOR)
        return solve_sum(factored, matrix)

    def trace(self, block: Block, state: State) -> float:
        """Σ tr R_k · tr S_k, or of the first product alone where that is more."""
        r, s = (m.diagonal(dim1=2, dim2=3).sum(2).double() for m in self.terms(state).products)
        return float(torch.maximum((r * s).sum(0), r[0] * s[0]).sum())

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """The approximation in words, numbers kept, multiply-adds of an inversion."""
        groups, outputs, inputs = block.shape
        sizes = (inputs, outputs)
        kept = self.rank * sum(n * (n + 1) // 2 for n in sizes) + self.rank + 1
        kept += sum(n**2 + n for n in sizes)
        words = f"{self._words()}, {self.sharing_of(block)}, {self.inverse}"
        return words, groups * kept, groups * 12 * sum(n**3 for n in sizes)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Eigenvalue ranges of the first product, and the Fisher error."""
        terms = self.terms(state)
        found: dict[str, Any] = {
            "inputs": eigenvalue_range(terms.inputs[0]),
            "outputs": eigenvalue_range(terms.outputs[0]),
        }
        if "s1" in state:
            k = FactoredSum(state["k1"], state["k2"], state["s1"], state["s2"], FLOOR)
            found["smallest"] = k.smallest
        if rows:
            precise = Terms(*(part.double() for part in terms))
            found["fisher_error"] = terms_error(rows[0].double(), precise)
        return found

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """The first product's."""
        terms = self.terms(state)
        return terms.inputs[0], terms.outputs[0]

    def terms(self, state: State) -> Terms:
        """The sum as last averaged."""
        r, s = (unpack(state[key]) for key in ("r", "s"))
        shape = self.rank, len(r) // self.rank
        return Terms(
            r.reshape(*shape, *r.shape[1:]),
            s.reshape(*shape, *s.shape[1:]),
            state["values"],
            state["squared_norm"],
        )

    def _keep(self, state: State, terms: Terms) -> None:
        state["r"], state["s"] = (pack(m.flatten(0, 1)) for m in terms.products)
        state["values"] = terms.values.to(terms.inputs)
        state["squared_norm"] = terms.squared_norm.to(terms.inputs)

    def _words(self) -> str:
        return f"nearest sum of {self.rank} products"


FLOOR = 0.05  # of 1 + s₂ s₁ᵀ in the clamped inverse


def as_used(rows: Sequence[Rows], sharing: str) -> Rows:
    """All micro-batches, with a weight's uses put together."""
    seen = joined(rows)
    if seen.uses == 1 or sharing == "exact":
        return seen
    return reduced(seen) if sharing == "reduce" else expanded(seen)


def _unknown(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Values and norm of terms of which only the matrices count."""
    groups = matrices.shape[1]
    return matrices.new_zeros(groups, 1), matrices.new_zeros(groups)
