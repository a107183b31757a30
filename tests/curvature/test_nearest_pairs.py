"""Products of few eigenpairs against the same sum of whole matrices, in float64."""

import pytest
import torch
from torch import Tensor

from smallfry.curvature import Rows
from smallfry.curvature.kronecker import NotFiniteError
from smallfry.curvature.kronecker_svd import Solver, nearest_terms
from smallfry.curvature.low_rank import LowRank
from smallfry.curvature.nearest_pairs import Pair, nearest_pairs
from smallfry.curvature.terms import Terms


def rows(seed: int, draws: int = 1, groups: int = 1, samples: int = 5) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = normal(groups, samples, 1, 24) * torch.linspace(0.2, 2, samples)[:, None, None]
    return Rows(spread, normal(groups, draws, samples, 1, 20))


def dense(factor: LowRank | Tensor) -> Tensor:
    return factor.dense() if isinstance(factor, LowRank) else factor


def as_terms(pairs: tuple[Pair, ...]) -> Terms:
    r, s = (torch.stack([dense(pair[side]) for pair in pairs]) for side in (0, 1))
    return Terms(r, s, r.new_zeros(r.shape[1], len(r)), r.new_zeros(r.shape[1]))


def assert_same(pairs: tuple[Pair, ...], terms: Terms) -> None:
    for pair, r, s in zip(pairs, terms.inputs, terms.outputs, strict=True):
        torch.testing.assert_close(dense(pair.inputs), r, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(dense(pair.outputs), s, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kept", [(8, 7), (8, None), (None, 7)])
@pytest.mark.parametrize(("draws", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_one_product_is_that_of_whole_matrices_if_nothing_is_cut(
    kept: tuple[int | None, int | None], draws: int, groups: int
) -> None:
    batch = rows(0, draws, groups, samples=3)
    found = nearest_pairs(batch, kept, torch.Generator().manual_seed(0))
    expected = nearest_terms(batch)
    assert_same(found.products, expected)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.squared_norm, expected.squared_norm)


@pytest.mark.parametrize("solver", ["deflation", "lanczos"])
@pytest.mark.parametrize("count", [1, 2])
def test_an_average_with_stored_products_is_that_of_whole_matrices(
    count: int, solver: Solver
) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = (9, 9)  # 4 samples now, and 5 earlier ones
    old = nearest_pairs(rows(1), kept, generator, count=count, solver=solver)
    batch = rows(2, samples=4)
    found = nearest_pairs(
        batch, kept, generator, count=count, stored=old.products, keep=0.7, solver=solver
    )
    stored = as_terms(old.products)
    expected = nearest_terms(batch, count, stored=stored, keep=0.7, solver=solver)
    torch.testing.assert_close(found.values, expected.values)
    assert_same(found.products, expected)


def test_a_cut_keeps_the_trace_and_the_largest_eigenvalues() -> None:
    batch = rows(3, samples=12)
    product = nearest_pairs(batch, (4, 4), torch.Generator().manual_seed(0)).products[0]
    whole = nearest_terms(batch)
    for factor, matrix in zip(product, (whole.inputs[0], whole.outputs[0]), strict=True):
        assert isinstance(factor, LowRank)
        torch.testing.assert_close(factor.trace, matrix.diagonal(dim1=1, dim2=2).sum(1))
        top = torch.linalg.eigvalsh(matrix)[:, -1]
        torch.testing.assert_close(factor.values[:, -1], top, rtol=1e-3, atol=0)


def test_stored_products_with_flat_tails_count_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    old = nearest_pairs(rows(4, samples=12), (4, 4), generator).products
    assert all(isinstance(f, LowRank) and float(f.tail) > 0 for f in old[0])
    batch = rows(5, samples=6)
    found = nearest_pairs(batch, (None, None), generator, stored=old, keep=0.5)
    expected = nearest_terms(batch, stored=as_terms(old), keep=0.5)
    assert_same(found.products, expected)


def test_rows_that_are_not_finite_are_refused() -> None:
    batch = rows(6)
    batch.inputs[0, 0, 0, 0] = torch.inf
    with pytest.raises(NotFiniteError):
        nearest_pairs(batch, (4, 4), torch.Generator())
