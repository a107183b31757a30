"""KPSVD: nearest Kronecker products to a block's Fisher (Koroko et al. 2022, 2201.10285).

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
from typing import Any, Literal, Unpack

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
from smallfry.curvature.low_rank import (
    LowRank,
    PencilSide,
    compress,
    pencil_side,
    solve_pencil,
)
from smallfry.curvature.nearest_pairs import Factor, Pair, nearest_pairs
from smallfry.curvature.terms import Terms, expanded, joined, terms_error
from smallfry.errors import UsageError
from smallfry.optim.approximation import Approximation, State, Summed, eigenvalue_range
from smallfry.optim.base import NaturalGradient
from smallfry.optim.kfac import SIDES, KroneckerProduct, low_rank
from smallfry.optim.one_hot import OneHotNearest, sharing_of_rows
from smallfry.optim.settings import Settings, require_count

Sharing = Literal["exact", "expand", "reduce"]
Inverse = Literal["clamped", "pcg"]
FEW_ROWS = Settings(max_rows=512)


class ProductSettings(Settings, total=False):
    """Keywords of ``KPSVD`` for a given number of products."""

    sharing: Sharing | dict[str, Sharing]
    damping_split: Literal["factored", "tikhonov"]
    factor_rank: int | None
    inverse: Inverse


class KPSVD(NaturalGradient):
    """Natural gradient with the nearest sum of Kronecker products.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        rank: Products in the sum.
        sharing: Of a weight's uses: "exact" takes a sample's whole gradient, "expand" treats uses
            as samples, "reduce" averages inputs; for all layers or by layer name.
        damping_split: For one product, as in ``KFAC``.
        factor_rank: See ``KFAC``; of each matrix of two products, whole with "pcg".
        inverse: For two products: "clamped", or "pcg" for conjugate gradients with the exact λ,
            which more than two need.
        settings: Those of ``NaturalGradient``. The default ``max_rows`` is 512: the search for
            products takes the square of it.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import KPSVD
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = KPSVD(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
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
        **settings: Unpack[Settings],
    ) -> None:
        approximation: Approximation
        if inverse not in ("clamped", "pcg"):
            raise UsageError(f"inverse is 'clamped' or 'pcg', not '{inverse}'")
        if rank == 1 and inverse == "pcg":
            raise UsageError(
                "one product is inverted exactly: inverse='pcg' is for rank=2 and more"
            )
        if rank != 1 and damping_split != "factored":
            raise UsageError(f"damping_split='{damping_split}' is for one product: rank=1")
        if rank == 1:
            approximation = NearestProduct(damping_split, sharing, factor_rank)
        else:
            approximation = NearestSum(rank, sharing, self.solver, inverse, factor_rank)
        super().__init__(model, lr, approximation, **(FEW_ROWS | settings))


class Deflation(KPSVD):
    """Nearest sum of two products, found one after the other; arguments as in ``KPSVD``.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import Deflation
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = Deflation(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-2, **settings: Unpack[ProductSettings]
    ) -> None:
        super().__init__(model, lr, rank=2, **settings)


class Lanczos(Deflation):
    """Nearest sum of two products, found in one Krylov space.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import Lanczos
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = Lanczos(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    solver: Solver = "lanczos"


class NearestProduct(KroneckerProduct):
    """R ⊗ S; the arguments are those of ``KPSVD``."""

    sharing_choices = ("exact", "expand", "reduce")
    words = "nearest R ⊗ S"
    divides = False

    def __init__(
        self,
        damping_split: str = "factored",
        sharing: str | Mapping[str, str] = "exact",
        factor_rank: int | None = 64,
    ) -> None:
        super().__init__(damping_split, sharing, factor_rank)

    def summed(self, block: Block) -> Summed | None:
        """Return None: the nearest product is not a function of sums."""
        return None

    def for_one_hot(self) -> Approximation:
        """Return the nearest product with a diagonal factor of inputs."""
        return OneHotNearest(sharing_of_rows(self.sharing), self.damping_split)

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Find the nearest product to the old one and the batch together."""
        seen = as_used(rows, self.sharing_of(block))
        kept = self.rank_of(block, "a"), self.rank_of(block, "g")
        if seen.uses == 1 and kept != (None, None):
            old = [Pair(*(_factor(state, side) for side in SIDES))] if keep else []
            product = nearest_pairs(seen, kept, generator, stored=old, keep=keep).products[0]
            for side, factor in zip(SIDES, product, strict=True):
                state |= _as_state(side, factor)
            return
        stored = None
        if keep:
            r, s = (self.dense(state, side)[None] for side in SIDES)
            stored = Terms(r, s, *_unknown(r))
        found = nearest_terms(seen, stored=stored, keep=keep)
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
        factor_rank: int | None = 64,
    ) -> None:
        super().__init__(sharing)
        require_count("factor_rank", factor_rank, optional=True)
        require_count("rank", rank)
        if inverse not in ("clamped", "pcg"):
            raise UsageError(f"inverse is 'clamped' or 'pcg', not '{inverse}'")
        if rank > 2 and inverse == "clamped":
            raise UsageError(f"a sum of {rank} products is inverted by inverse='pcg' only")
        self.rank, self.solver, self.inverse = rank, solver, inverse
        self.factor_rank = None if inverse == "pcg" else factor_rank

    def settings(self) -> dict[str, Any]:
        """Return the settings of a saved state, as plain data."""
        own = {"rank": self.rank, "inverse": self.inverse, "factor_rank": self.factor_rank}
        return super().settings() | own

    def for_one_hot(self) -> Approximation:
        """Return a single product: a sum of several has no cheap inverse there."""
        return OneHotNearest(sharing_of_rows(self.sharing))

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Find the nearest sum to the old one and the batch together."""
        seen = as_used(rows, self.sharing_of(block))
        if seen.uses == 1 and self.few(block):
            self._update_few(state, seen, keep, generator)
            return
        stored = self.terms(state) if keep else None
        found = nearest_terms(seen, self.rank, stored=stored, keep=keep, solver=self.solver)
        self.store(block, state, found, generator)

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Factor the sum with its first product damped, or decompose it for conjugate gradients."""
        if self.few(block):
            return self._invert_few(state, damping)
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
        """Solve in the common eigenbasis, or by conjugate gradients."""
        if self.few(block):
            inputs, outputs = (
                PencilSide(
                    LowRank(*(state[f"{name}_root_{side}"] for name in LowRank._fields)),
                    state[f"pencil_{side}"],
                    state[f"s_{side}"],
                )
                for side in SIDES
            )
            return solve_pencil(inputs, outputs, matrix, FLOOR)
        if self.inverse == "pcg":
            pair = Eigen(state["la"], state["qa"]), Eigen(state["lg"], state["qg"])
            return solve_sum_pcg(self.terms(state), matrix, damping, pair).solution
        factored = FactoredSum(state["k1"], state["k2"], state["s1"], state["s2"], FLOOR)
        return solve_sum(factored, matrix)

    def trace(self, block: Block, state: State) -> float:
        """Compute Σ tr R_k · tr S_k, or that of the first product alone if it is larger."""
        r, s = (m.diagonal(dim1=2, dim2=3).sum(2).double() for m in self.terms(state).products)
        return float(torch.maximum((r * s).sum(0), r[0] * s[0]).sum())

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the approximation: words, numbers kept, multiply-adds of an inversion."""
        groups, outputs, inputs = block.shape
        sizes = (inputs, outputs)
        words = f"{self.words}, {self.sharing_of(block)}, {self.inverse}"
        kept = self.rank + 1
        if self.few(block):
            assert self.factor_rank is not None
            pairs = [min(n, self.factor_rank) for n in sizes]
            # two matrices, the first one's root, and the pencil's vectors and values
            kept += sum(4 * n * k + 4 * k + 3 for n, k in zip(sizes, pairs, strict=True))
            return f"{words}, rank {self.factor_rank}", groups * kept, 0
        kept += self.rank * sum(n * (n + 1) // 2 for n in sizes)
        kept += sum(n**2 + n for n in sizes)
        return words, groups * kept, groups * 12 * sum(n**3 for n in sizes)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute eigenvalue ranges of the first product, and the Fisher error."""
        terms = self.terms(state)
        found: dict[str, Any] = {
            "inputs": eigenvalue_range(terms.inputs[0]),
            "outputs": eigenvalue_range(terms.outputs[0]),
        }
        for keys in (("k1", "k2", "s1", "s2"), ("pencil_a", "pencil_g", "s_a", "s_g")):
            if keys[0] in state:
                k1, k2, s1, s2 = (state[key] for key in keys)
                found["smallest"] = FactoredSum(k1, k2, s1, s2, FLOOR).smallest
        if rows:
            precise = Terms(*(part.double() for part in terms))
            found["fisher_error"] = terms_error(rows[0].double(), precise)
        return found

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the factors of the first product."""
        terms = self.terms(state)
        return terms.inputs[0], terms.outputs[0]

    def terms(self, state: State) -> Terms:
        """Return the sum as last averaged."""
        sides = []
        for side in SIDES:
            if side in state:
                whole = unpack(state[side])
                sides.append(whole.reshape(self.rank, -1, *whole.shape[1:]))
            else:
                pairs = [low_rank(state, f"{k}{side}") for k in range(self.rank)]
                sides.append(torch.stack([one.dense() for one in pairs if one is not None]))
        return Terms(sides[0], sides[1], state["values"], state["squared_norm"])

    def few(self, block: Block) -> bool:
        """Return whether matrices are stored as a few eigenpairs."""
        return self.factor_rank is not None and max(block.shape[1:]) > 2 * self.factor_rank

    def store(self, block: Block, state: State, terms: Terms, generator: torch.Generator) -> None:
        """Store the sum for the next average."""
        for side, matrices in zip(SIDES, terms.products, strict=True):
            if not self.few(block):
                state[side] = pack(matrices.flatten(0, 1))
                continue
            assert self.factor_rank is not None
            for k, matrix in enumerate(matrices):
                near = low_rank(state, f"{k}{side}")
                pairs = compress(matrix, self.factor_rank, generator, near, signed=k > 0)
                state |= {f"{name}_{k}{side}": t for name, t in pairs._asdict().items()}
        state["values"] = terms.values.to(terms.inputs)
        state["squared_norm"] = terms.squared_norm.to(terms.inputs)

    def _update_few(
        self, state: State, seen: Rows, keep: float, generator: torch.Generator
    ) -> None:
        old = []
        if keep:
            names = [[f"{k}{side}" for side in SIDES] for k in range(self.rank)]
            old = [Pair(*(_factor(state, name) for name in pair)) for pair in names]
        found = nearest_pairs(
            seen,
            (self.factor_rank, self.factor_rank),
            generator,
            count=self.rank,
            stored=old,
            keep=keep,
            solver=self.solver,
        )
        for k, pair in enumerate(found.products):
            for side, factor in zip(SIDES, pair, strict=True):
                state |= _as_state(f"{k}{side}", factor)
        state["values"] = found.values.to(seen.inputs)
        state["squared_norm"] = found.squared_norm.to(seen.inputs)

    def _invert_few(self, state: State, damping: float) -> float:
        firsts = [low_rank(state, f"0{side}") for side in SIDES]
        means = [one.trace / one.vectors.shape[1] for one in firsts if one is not None]
        by = split_damping(means[0], means[1], damping)
        for side, first, damp in zip(SIDES, firsts, by, strict=True):
            second = low_rank(state, f"1{side}")
            assert first is not None
            assert second is not None
            found = pencil_side(first, damp, second)
            state |= {f"{name}_root_{side}": t for name, t in found.root._asdict().items()}
            state |= {f"pencil_{side}": found.vectors, f"s_{side}": found.values}
        return 1.0

    @property
    def words(self) -> str:
        """Description of the sum."""
        return f"nearest sum of {self.rank} products"


FLOOR = 0.05  # of 1 + s₂ s₁ᵀ in the clamped inverse


def as_used(rows: Sequence[Rows], sharing: str) -> Rows:
    """Join all micro-batches, with a weight's uses combined."""
    if sharing == "exact" or max(part.uses for part in rows) == 1:
        return joined(rows)
    if sharing == "reduce":
        return joined([reduced(part) for part in rows])
    return expanded(rows)


def _factor(state: State, name: str) -> Factor:
    """Return a matrix in its stored form."""
    few = low_rank(state, name)
    return unpack(state[name]) if few is None else few


def _as_state(name: str, factor: Factor) -> State:
    """Convert a matrix to its stored form."""
    if isinstance(factor, LowRank):
        return {f"{part}_{name}": t for part, t in factor._asdict().items()}
    return {name: pack(factor)}


def _unknown(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return placeholder values and norm of terms of which only the matrices count."""
    groups = matrices.shape[1]
    return matrices.new_zeros(groups, 1), matrices.new_zeros(groups)
