"""Nearest sum of Kronecker products with low-rank matrices.

The same as ``kronecker_svd.nearest_terms`` for a layer that each sample uses once, without ever
forming a matrix of inputs by inputs or outputs by outputs: inner products with a stored matrix, and
products with the new one, need its eigenpairs and the batch's rows alone. With B rows of d features
and r pairs that is O(B² d + B d r), where matrices take O(B d²).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.curvature.columns import Columns, bordered, grams
from smallfry.curvature.kronecker import NotFiniteError
from smallfry.curvature.kronecker_svd import Solver, column_triplets, in_full_precision
from smallfry.curvature.low_rank import LowRank, compress, inner, leading_pairs
from smallfry.curvature.rows import Rows
from smallfry.curvature.symmetric import quadratic_forms, symmetric_product

Factor = LowRank | Tensor  # a matrix as pairs, or whole: (groups, size, size)


class Pair(NamedTuple):
    """R ⊗ S."""

    inputs: Factor  # R
    outputs: Factor  # S


class Pairs(NamedTuple):
    """Σ_k R_k ⊗ S_k; values and norm as in ``Terms``."""

    products: tuple[Pair, ...]
    values: Tensor  # σ, (groups, count), descending, float64
    squared_norm: Tensor  # (groups,), of what they approximate, float64


def nearest_pairs(
    rows: Rows,
    kept: tuple[int | None, int | None],
    generator: torch.Generator,
    *,
    count: int = 1,
    stored: Sequence[Pair] = (),
    keep: float = 0.0,
    solver: Solver = "deflation",
) -> Pairs:
    """Find the nearest sum of ``count`` products to keep · Σ stored + (1 − keep) F, at low rank.

    Args:
        rows: Rows of the block in a batch, with one use per sample.
        kept: Eigenpairs of the inputs' and of the outputs' matrices; None keeps them whole.
        generator: Generator of the initial directions of the eigenvector search.
        count: Products.
        stored: Stored sum of earlier batches.
        keep: Their weight, from 0 to 1.
        solver: See ``nearest_terms``.

    Raises:
        NotFiniteError: The rows or the stored products are not finite.
    """
    rows = in_full_precision(rows)
    stored = stored if keep else ()
    draws = rows.gradients.shape[1]
    sides = (
        (rows.inputs[:, :, 0], [pair.inputs for pair in stored], 1),
        (rows.gradients[:, :, :, 0].flatten(1, 2), [pair.outputs for pair in stored], draws),
    )
    gram = [
        _with_stored(own, x, factors, times)
        for own, (x, factors, times) in zip(grams(rows), sides, strict=True)
    ]
    share = (1 - keep if stored else 1.0) / rows.samples
    weights = [share] * rows.samples + [keep] * len(stored)
    operator = Columns(gram[0], gram[1], gram[0].new_tensor(weights), None)
    squared_norm = operator.squared_norm()
    if not bool(squared_norm.isfinite().all()):
        raise NotFiniteError("a block's inputs, gradients or stored terms are not finite")
    found = column_triplets(operator, rows, count, solver, None)
    root = found.values.sqrt()[:, :, None]
    products = []
    for k in range(count):
        mixed = []
        for (x, factors, times), coefficients in zip(sides, found[1:3], strict=True):
            c = (coefficients * root)[:, k].to(x)
            own = c[:, : rows.samples].repeat(1, times)
            mixed.append(_Mixed(x, own, factors, c[:, rows.samples :]))
        sign = torch.where(mixed[0].trace() < 0, -1.0, 1.0).to(mixed[0].x)
        near = stored[k] if k < len(stored) else (None, None)
        products.append(
            Pair(
                *(
                    side.times(sign).cut(pairs, generator, old, signed=k > 0)
                    for side, pairs, old in zip(mixed, kept, near, strict=True)
                )
            )
        )
    return Pairs(tuple(products), found.values, squared_norm.clamp_min(0))


class _Mixed(NamedTuple):
    """Implicit matrix Σ_b c_b x_b x_bᵀ + Σ_k w_k R_k."""

    x: Tensor  # (groups, rows, size)
    own: Tensor  # c, (groups, rows)
    stored: Sequence[Factor]
    weights: Tensor  # w, (groups, stored)

    def times(self, scale: Tensor) -> "_Mixed":
        """Scale all coefficients, (groups,)."""
        return self._replace(own=self.own * scale[:, None], weights=self.weights * scale[:, None])

    def trace(self) -> Tensor:
        """Compute the traces, (groups,)."""
        total = (self.own * self.x.square().sum(2)).sum(1)
        for factor, weight in zip(self.stored, self.weights.unbind(1), strict=True):
            total = total + weight * _trace(factor)
        return total

    def product(self, y: Tensor) -> Tensor:
        """Multiply the matrix by (groups, size, columns)."""
        result = self.x.transpose(1, 2) @ (self.own[:, :, None] * (self.x @ y))
        for factor, weight in zip(self.stored, self.weights.unbind(1), strict=True):
            image = factor.times(y) if isinstance(factor, LowRank) else factor @ y
            result = torch.addcmul(result, weight[:, None, None], image)
        return result

    def dense(self) -> Tensor:
        """Form the matrix, (groups, size, size)."""
        result = symmetric_product(self.x * self.own[:, :, None], self.x)
        for factor, weight in zip(self.stored, self.weights.unbind(1), strict=True):
            result += weight[:, None, None] * _dense(factor)
        return result

    def cut(
        self, pairs: int | None, generator: torch.Generator, near: Factor | None, signed: bool
    ) -> Factor:
        """Compute the leading pairs, or the whole matrix."""
        if pairs is None:
            return self.dense()
        size = self.x.shape[2]
        start = near if isinstance(near, LowRank) else None
        if size <= 2 * pairs:  # as small as its pairs
            return compress(self.dense(), pairs, generator, start, signed)
        first = None if start is None else start.vectors
        return leading_pairs(self.product, self.trace(), size, pairs, first, generator, signed)


def _with_stored(own: Tensor, x: Tensor, factors: Sequence[Factor], draws: int) -> Tensor:
    """Compute the Gram matrix of samples and stored matrices."""
    if not factors:
        return own
    forms = [_forms(x, factor).reshape(len(x), draws, -1).sum(1) for factor in factors]
    corner = [[_inner(one, other) for other in factors] for one in factors]
    square = torch.stack([torch.stack(line, 1) for line in corner], 1)
    return bordered(own, torch.stack(forms, 1).double(), square.double())


def _forms(x: Tensor, factor: Factor) -> Tensor:
    """Compute xᵀ R x of every row, (groups, rows)."""
    if not isinstance(factor, LowRank):
        return quadratic_forms(x, factor)
    excess = (factor.values - factor.tail[:, None])[:, :, None]
    shares = ((x @ factor.vectors).square_() @ excess).squeeze(2)
    return shares + factor.tail[:, None] * x.square().sum(2)


def _inner(one: Factor, other: Factor) -> Tensor:
    """Compute ⟨R, R'⟩, (groups,)."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return inner(one, other)
    return (_dense(one) * _dense(other)).sum((1, 2))


def _trace(factor: Factor) -> Tensor:
    if isinstance(factor, LowRank):
        return factor.trace
    return factor.diagonal(dim1=1, dim2=2).sum(1)


def _dense(factor: Factor) -> Tensor:
    return factor.dense() if isinstance(factor, LowRank) else factor
