"""KFAC: a block's Fisher as one Kronecker product (Martens and Grosse 2015, arXiv 1503.05671).

F ≈ A ⊗ G with A = E[a aᵀ] and G = E[g gᵀ], as if inputs and gradients were independent. Where a
weight is used T times by a sample (Eschenhagen et al. 2023, arXiv 2311.00636),

    expand   A averages over samples and uses, G sums over uses: exact if uses don't interact
    reduce   a is averaged and g summed over uses first: exact where uses are averaged behind

Exact for deep linear networks under a Gaussian likelihood, and for a single sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import (
    Eigen,
    damped_inverse,
    eigendecompose,
    input_factor,
    kronecker_error,
    output_factor,
    pack,
    packed_mean,
    reduced,
    solve_tikhonov,
    split_damping,
    unpack,
)
from smallfry.curvature.low_rank import OVERSAMPLING, Average, LowRank, gram_times, solve_sides
from smallfry.errors import UsageError
from smallfry.optim.approximation import (
    Approximation,
    Broadcast,
    State,
    Sum,
    Summed,
    Updating,
    eigenvalue_range,
    running,
)
from smallfry.optim.base import NaturalGradient
from smallfry.optim.numerics import statistics_dtype
from smallfry.optim.one_hot import OneHotProduct
from smallfry.optim.settings import Settings, require_count

Sharing = Literal["expand", "reduce"]
SIDES = ("a", "g")


class KFAC(NaturalGradient):
    """Natural gradient with Kronecker-factored blocks.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        damping_split: "factored" damps A and G apart (Cholesky, two products a step); "tikhonov"
            damps their product exactly, in its eigenbasis (four products, and costlier refreshes).
        sharing: "expand" or "reduce", for all layers or by layer name.
        factor_rank: Eigenpairs kept of each factor larger than twice that, beside one value for
            the rest of its spectrum; None keeps factors whole, as "tikhonov" always does. Steps
            and refreshes cost much less with it, and the inverse follows the statistics at once.
        settings: Those of ``NaturalGradient``.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import KFAC
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = KFAC(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        damping_split: Literal["factored", "tikhonov"] = "factored",
        sharing: Sharing | dict[str, Sharing] = "expand",
        factor_rank: int | None = 64,
        **settings: Unpack[Settings],
    ) -> None:
        product = KroneckerProduct(damping_split, sharing, factor_rank)
        super().__init__(model, lr, product, **settings)


class KroneckerProduct(Approximation):
    """A ⊗ G; the arguments are those of ``KFAC``."""

    words = "A ⊗ G"
    divides = True

    def __init__(
        self,
        damping_split: str = "factored",
        sharing: str | Mapping[str, str] = "expand",
        factor_rank: int | None = 64,
    ) -> None:
        super().__init__(sharing)
        if damping_split not in ("factored", "tikhonov"):
            raise UsageError(f"damping_split is 'factored' or 'tikhonov', not '{damping_split}'")
        require_count("factor_rank", factor_rank, optional=True)
        self.damping_split = damping_split
        self.factor_rank = None if damping_split == "tikhonov" else factor_rank

    def settings(self) -> dict[str, Any]:
        """Return the settings of a saved state, as plain data."""
        own = {"damping_split": self.damping_split, "factor_rank": self.factor_rank}
        return super().settings() | own

    def for_one_hot(self) -> Approximation:
        """Return a method of frequencies and G."""
        return OneHotProduct("expand", self.damping_split)

    def updating(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        samples: float,
        keep: float,
        generator: torch.Generator,
    ) -> Updating:
        """Update from sums of factors, or of their products with a few directions."""
        seen = folded(rows, self.sharing_of(block) == "reduce", samples)
        ranks = {side: self.rank_of(block, side) for side in SIDES}
        few = {
            side: FewPairs(_rows(block, seen, side), Average(low_rank(state, side), keep, rank))
            for side, rank in ranks.items()
            if rank is not None
        }
        parts: State = {s: factor_of(block, seen, s) for s in SIDES if s not in few}
        first = {side: one.average.directions(one.rows, generator) for side, one in few.items()}
        for side, one in few.items():
            parts |= one.sums(side, first[side])
        totals = yield Sum(parts, everywhere=not few)
        bases, products = State(), State()
        if few:
            bases = yield Broadcast(
                first,
                lambda: {
                    s: m.average.basis(first[s], totals[f"first_{s}"]) for s, m in few.items()
                },
            )
            products = yield Sum({s: gram_times(m.rows, bases[s]) for s, m in few.items()})
        if totals is None:
            return  # another process owns the block
        fresh: State = {}
        for side, one in few.items():
            pairs = one.average.pairs(bases[side], products[side], totals[f"trace_{side}"])
            fresh |= {f"{name}_{side}": t for name, t in pairs._asdict().items()}
        for side in (side for side in SIDES if side not in few):
            fresh[side] = running(state, side, totals[side], keep)
        state |= fresh

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Invert the factors, each damped, or decompose them."""
        if self.damping_split == "tikhonov":
            ea, eg = eigendecompose(unpack(state["a"])), eigendecompose(unpack(state["g"]))
            state |= {"qa": ea.vectors, "la": ea.values, "qg": eg.vectors, "lg": eg.values}
            return 1.0
        a, g = (self._mean(block, state, side) for side in SIDES)
        fresh: State = dict(zip(("da", "dg"), split_damping(a, g, damping), strict=True))
        raised = 1.0
        for side in SIDES:
            if self.rank_of(block, side) is None:
                inverse = damped_inverse(unpack(state[side]), fresh[f"d{side}"])
                # packed where the factors would otherwise outweigh the weights they belong to
                packed = packs_inverse(block.shape)
                fresh[f"i{side}"] = pack(inverse.matrix) if packed else inverse.matrix
                raised = max(raised, inverse.raised)
        state |= fresh
        return raised

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Multiply by both inverses, thin ones for low-rank factors."""
        if self.damping_split == "tikhonov":
            a, g = Eigen(state["la"], state["qa"]), Eigen(state["lg"], state["qg"])
            return solve_tikhonov(a, g, matrix, damping)
        low = {side: low_rank(state, side) for side in SIDES}
        if low["g"] is None:
            matrix = self._inverse(block, state, "g") @ matrix
        if low["a"] is None:
            matrix = matrix @ self._inverse(block, state, "a")
        if low["a"] is None and low["g"] is None:
            return matrix
        return solve_sides(low["a"], low["g"], matrix, state["da"], state["dg"])

    def trace(self, block: Block, state: State) -> float:
        """Compute tr A · tr G."""
        a, g = (self._mean(block, state, side).double() for side in SIDES)
        return float((a * g).sum()) * block.shape[1] * block.shape[2]

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the approximation: words, numbers kept, multiply-adds of an inversion."""
        groups, outputs, inputs = block.shape
        kept = work = 0
        for side, size in zip(SIDES, (inputs, outputs), strict=True):
            rank = self.rank_of(block, side)
            triangle = size * (size + 1) // 2
            if rank is not None:
                kept += size * rank + rank + 1
            elif self.damping_split == "tikhonov":
                kept, work = kept + triangle + size**2 + size, work + 9 * size**3
            else:
                kept += 2 * triangle if packs_inverse(block.shape) else triangle + size**2
                work += size**3
        kept += 2 if self.damping_split == "factored" else 0
        ranked = "" if self.factor_rank is None else f", rank {self.factor_rank}"
        words = f"{self.words}, {self.sharing_of(block)}, {self.damping_split}{ranked}"
        return words, groups * kept, groups * work

    def summed(self, block: Block) -> Summed | None:
        """Describe the summed factors, or their products with a few directions."""
        groups, outputs, inputs = block.shape
        numbers = spread = everywhere = macs = 0
        ranked = any(self.rank_of(block, side) is not None for side in SIDES)
        for side, size in zip(SIDES, (inputs, outputs), strict=True):
            rank = self.rank_of(block, side)
            if rank is None:
                triangle, macs = size * (size + 1) // 2, macs + size**2
                numbers, everywhere = (
                    numbers + triangle * ranked,
                    everywhere + triangle * (not ranked),
                )
                continue
            directions = size * min(rank + OVERSAMPLING, size)
            numbers, spread = numbers + 2 * directions + 1, spread + directions
            macs += 4 * directions
        return Summed(*(groups * each for each in (numbers, spread, everywhere, macs)))

    def burden(self, block: Block) -> int:
        """Estimate multiply-adds of inversions, and of the bases of low-rank factors."""
        groups, outputs, inputs = block.shape
        bases = 0
        for side, size in zip(SIDES, (inputs, outputs), strict=True):
            rank = self.rank_of(block, side)
            bases += 0 if rank is None else 4 * size * (rank + OVERSAMPLING) ** 2
        return self.cost(block, {})[2] + groups * bases

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute eigenvalue ranges and the Fisher error."""
        found: dict[str, Any] = {"inputs": _range(state, "a"), "outputs": _range(state, "g")}
        if rows:
            a, g = self.dense(state, "a"), self.dense(state, "g")
            found["fisher_error"] = kronecker_error(rows[0].double(), a.double(), g.double())
        return found

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """Return A and G as full matrices."""
        return self.dense(state, "a"), self.dense(state, "g")

    def rank_of(self, block: Block, side: str) -> int | None:
        """Return the number of eigenpairs kept of a factor; None for all."""
        size = block.shape[2 if side == "a" else 1]
        rank = self.factor_rank
        return rank if rank is not None and size > 2 * rank else None

    def _mean(self, block: Block, state: State, side: str) -> Tensor:
        """Compute the mean eigenvalue of a factor, (groups,)."""
        low = low_rank(state, side)
        if low is None:
            return packed_mean(state[side])
        return low.trace / low.vectors.shape[1]

    def _inverse(self, block: Block, state: State, side: str) -> Tensor:
        inverse: Tensor = state[f"i{side}"]
        return unpack(inverse) if packs_inverse(block.shape) else inverse

    def dense(self, state: State, side: str) -> Tensor:
        """Form A or G as last averaged, (groups, size, size)."""
        low = low_rank(state, side)
        return unpack(state[side]) if low is None else low.dense()


class FewPairs(NamedTuple):
    """Low-rank factor, updated from the rows of one process."""

    rows: Tensor  # (groups, rows, size), whose Gram matrix is the factor
    average: Average

    def sums(self, side: str, directions: Tensor) -> State:
        """Sum over rows: the factor times directions, and its trace."""
        products = gram_times(self.rows, directions)
        return {f"first_{side}": products, f"trace_{side}": (self.rows**2).sum((1, 2))}


def factor_of(block: Block, rows: Sequence[Rows], side: str) -> Tensor:
    """Compute A = E[a aᵀ] or G = E[g gᵀ] of a block, packed."""
    factor = input_factor if side == "a" else output_factor
    return pack(sum_over(rows, factor, _nothing(block, side)))


def folded(rows: Sequence[Rows], reduce: bool, samples: float) -> list[Rows]:
    """Weight micro-batches so that all factors add up to those of a number of samples."""
    seen = []
    for part in rows:
        one = reduced(part) if reduce and part.uses > 1 else part
        share = (part.samples / samples) ** 0.5
        if share != 1:
            one = one._replace(inputs=one.inputs * share, gradients=one.gradients * share)
        seen.append(one)
    return seen


def sum_over(rows: Sequence[Rows], factor: Any, nothing: Tensor) -> Tensor:
    """Sum a factor over micro-batches."""
    parts = [factor(part) for part in rows]
    total: Tensor = sum(parts[1:], start=parts[0]) if parts else nothing
    return total


def low_rank(state: State, side: str) -> LowRank | None:
    """Return a low-rank factor; None if it is full, or absent so far."""
    if f"vectors_{side}" not in state:
        return None
    return LowRank(*(state[f"{name}_{side}"] for name in LowRank._fields))


def _range(state: State, side: str) -> tuple[float, float]:
    """Compute the smallest and largest eigenvalue of a factor."""
    low = low_rank(state, side)
    if low is None:
        return eigenvalue_range(unpack(state[side]))
    values = torch.cat([low.values, low.tail[:, None]], 1)
    return float(values.min()), float(values.max())


def packs_inverse(shape: tuple[int, int, int]) -> bool:
    """Return whether full inverses with packed factors would exceed four times the weights."""
    _, outputs, inputs = shape
    return 1.5 * (outputs**2 + inputs**2) > 4 * outputs * inputs


def _rows(block: Block, rows: Sequence[Rows], side: str) -> Tensor:
    """Return the rows whose Gram matrix is the factor, (groups, rows, size)."""
    if not rows:
        return _nothing(block, side)[:, :0]
    if side == "a":
        flat = [
            (r.inputs if r.weights is None else r.inputs * r.weights.sqrt()[..., None])
            .flatten(1, 2)
            .div((r.samples * r.uses) ** 0.5)
            for r in rows
        ]
    else:
        flat = [r.gradients.flatten(1, 3) / r.samples**0.5 for r in rows]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def _nothing(block: Block, side: str) -> Tensor:
    """Return the factor of no samples."""
    groups, outputs, inputs = block.shape
    size = inputs if side == "a" else outputs
    like = next(iter(block.parameters.values()))
    return like.new_zeros((), dtype=statistics_dtype(like.dtype)).expand(groups, size, size)
