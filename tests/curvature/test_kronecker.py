"""Kronecker algebra and the exact Fisher against dense matrices, in float64."""

import pytest
import torch
from best_scale import best_scale
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.curvature import kronecker as kr
from smallfry.curvature.diagonal import basis_second_moments, diagonal_error
from smallfry.curvature.fisher import (
    combine,
    damped_solve,
    gram,
    projections,
    woodbury,
)
from smallfry.curvature.rows import Rows

D = torch.float64
SIZES = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3),
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6),
)  # fmt: skip


def mean_eigenvalue(matrix):
    return matrix.diagonal(dim1=1, dim2=2).mean(1)


def make(groups, draws, samples, uses, outputs, inputs, seed):
    random = torch.Generator().manual_seed(seed)
    return Rows(
        torch.randn(groups, samples, uses, inputs, dtype=D, generator=random),
        torch.randn(groups, draws, samples, uses, outputs, dtype=D, generator=random),
    )


def jacobian(rows):
    """(draws · samples, groups · outputs · inputs)."""
    w = torch.einsum("hknto,hnti->knhoi", rows.gradients, rows.inputs)
    return w.reshape(w.shape[0] * w.shape[1], -1)


def spd(groups, size, seed=0):
    x = torch.randn(groups, size, size + 1, dtype=D, generator=torch.Generator().manual_seed(seed))
    return x @ x.transpose(1, 2)


def kron(a, g):
    """A ⊗ G on row-major (outputs, inputs) matrices, blocks of groups on the diagonal."""
    return torch.block_diag(*(torch.kron(gh, ah) for ah, gh in zip(a, g, strict=True)))


@settings(deadline=None, max_examples=50)
@given(SIZES)
def test_the_implicit_fisher_is_the_dense_one(sizes):
    rows = make(*sizes)
    j = jacobian(rows)
    x = torch.randn(rows.inputs.shape[0], *sizes[4:6], dtype=D)
    v = torch.randn(len(j), dtype=D)
    torch.testing.assert_close(gram(rows), j @ j.T)
    torch.testing.assert_close(projections(rows, x), j @ x.reshape(-1))
    torch.testing.assert_close(combine(rows, v).reshape(-1), j.T @ v)
    torch.testing.assert_close(projections(rows, x) @ v, (combine(rows, v) * x).sum())


def test_both_ways_to_the_gram_matrix_agree():
    for shape in ((1, 2, 3, 2, 9, 9, 0), (2, 1, 5, 6, 2, 2, 1)):
        rows = make(*shape)
        torch.testing.assert_close(gram(rows), jacobian(rows) @ jacobian(rows).T)


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, st.floats(1e-3, 1e3))
def test_woodbury_is_the_dense_damped_solve_with_layers_coupled(first, second, damping):
    second = (*second[:1], *first[1:3], *second[3:])
    rows = {"a": make(*first), "b": make(*second)}
    x = {k: torch.randn(r.inputs.shape[0], r.gradients.shape[-1], r.inputs.shape[-1], dtype=D)
         for k, r in rows.items()}  # fmt: skip
    j = torch.cat([jacobian(r) for r in rows.values()], 1)
    fisher = j.T @ j / first[2]
    whole = torch.cat([t.reshape(-1) for t in x.values()])
    inner = sum(projections(r, x[k]) for k, r in rows.items())
    product = torch.cat([combine(r, inner).reshape(-1) for r in rows.values()]) / first[2]
    torch.testing.assert_close(product, fisher @ whole)
    factored = woodbury(sum(gram(r) for r in rows.values()), first[2], damping)
    solved = torch.cat([t.reshape(-1) for t in damped_solve(rows, x, factored).values()])
    expected = torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=D), whole)
    torch.testing.assert_close(solved, expected, rtol=1e-6, atol=1e-9)


def test_a_gram_matrix_that_rounding_made_indefinite_is_damped_tenfold():
    bad = torch.diag(torch.tensor([1.0, -0.5], dtype=D))
    factored = woodbury(bad, 1, 0.1)
    assert factored.damping == pytest.approx(1.0)
    with pytest.raises(ArithmeticError, match="however damped"):
        woodbury(torch.full((2, 2), torch.nan, dtype=D), 1, 0.1)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.floats(1e-3, 1e3))
def test_damped_solves_are_the_dense_ones(groups, inputs, outputs, damping):
    a, g = spd(groups, inputs), spd(groups, outputs, 1)
    x = torch.randn(groups, outputs, inputs, dtype=D)
    dense = kron(a, g) + damping * torch.eye(x.numel(), dtype=D)
    tikhonov = kr.solve_tikhonov(kr.eigendecompose(a), kr.eigendecompose(g), x, damping)
    expected = torch.linalg.solve(dense, x.reshape(-1))
    torch.testing.assert_close(tikhonov.reshape(-1), expected, rtol=1e-7, atol=1e-10)

    da, dg = kr.split_damping(mean_eigenvalue(a), mean_eigenvalue(g), damping)
    torch.testing.assert_close(da * dg, torch.full_like(da, damping))
    ia, ig = kr.damped_inverse(a, da), kr.damped_inverse(g, dg)
    assert ia.raised == ig.raised == 1
    da, dg = da[:, None, None], dg[:, None, None]
    damped = kron(a + da * torch.eye(inputs, dtype=D), g + dg * torch.eye(outputs, dtype=D))
    split = ig.matrix @ x @ ia.matrix
    expected = torch.linalg.solve(damped, x.reshape(-1))
    torch.testing.assert_close(split.reshape(-1), expected, rtol=1e-7, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(SIZES)
def test_inner_products_and_errors_are_those_of_the_dense_fisher(sizes):
    rows = make(*sizes)
    groups, _, samples, _, outputs, inputs, _ = sizes
    each = [Rows(rows.inputs[h : h + 1], rows.gradients[h : h + 1]) for h in range(groups)]
    fisher = torch.block_diag(*(jacobian(r).T @ jacobian(r) / samples for r in each))
    a, g = spd(groups, inputs), spd(groups, outputs, 1)
    torch.testing.assert_close(kr.inner_product(rows, a, g), (fisher * kron(a, g)).sum())
    torch.testing.assert_close(kr.squared_norm(a, g), (kron(a, g) ** 2).sum())
    torch.testing.assert_close(kr.fisher_squared_norm(rows), (fisher**2).sum())
    error = torch.linalg.norm(fisher - kron(a, g)) / torch.linalg.norm(fisher)
    assert kr.kronecker_error(rows, a, g) == pytest.approx(float(error), rel=1e-6)
    qa, qg = kr.eigendecompose(a).vectors, kr.eigendecompose(g).vectors
    q = kron(qa, qg)
    moments = basis_second_moments(rows, qa, qg, chunk=2)
    torch.testing.assert_close(moments.reshape(-1), (q.T @ fisher @ q).diagonal())
    values = moments + 0.1
    mine = torch.linalg.norm(fisher - q @ torch.diag(values.reshape(-1)) @ q.T)
    mine = float(mine / torch.linalg.norm(fisher))
    assert diagonal_error(rows, qa, qg, values) == pytest.approx(mine, rel=1e-6, abs=1e-7)


@settings(deadline=None, max_examples=30)
@given(SIZES)
def test_ekfacs_diagonal_is_never_worse_than_kfac_nor_the_scaled_kfac(sizes):
    rows = make(*sizes)
    a, g = kr.input_factor(rows), kr.output_factor(rows)
    qa, qg = kr.eigendecompose(a).vectors, kr.eigendecompose(g).vectors
    ekfac = diagonal_error(rows, qa, qg, basis_second_moments(rows, qa, qg))
    scaled = kr.kronecker_error(rows, a * best_scale(rows, a, g), g)
    kfac = kr.kronecker_error(rows, a, g)
    assert ekfac <= scaled + 1e-7
    if sizes[0] == 1:
        assert scaled <= kfac + 1e-7


def test_reduce_is_the_kfac_of_means_and_sums():
    rows = make(1, 2, 4, 3, 2, 3, 0)
    small = kr.reduced(rows)
    torch.testing.assert_close(small.inputs[0, :, 0], rows.inputs[0].mean(1))
    torch.testing.assert_close(small.gradients[0, :, :, 0], rows.gradients[0].sum(2))


@given(st.integers(1, 3), st.integers(1, 7))
def test_a_packed_triangle_comes_back_exactly(groups, size):
    matrix = spd(groups, size)
    matrix = (matrix + matrix.transpose(1, 2)) / 2
    packed = kr.pack(matrix)
    assert packed.shape == (groups, size * (size + 1) // 2)
    assert torch.equal(kr.unpack(packed), matrix)
    torch.testing.assert_close(kr.packed_mean(packed), mean_eigenvalue(matrix))


def test_a_nearly_singular_float32_factor_is_inverted_in_float64():
    root = torch.randn(40, 3, dtype=D)
    factor = (root @ root.T).float()[None] * 1e4
    damping = torch.tensor([1e-4])
    alone = factor.clone()
    alone.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    found = kr.damped_inverse(factor, damping)
    assert found.matrix.isfinite().all()
    eigen = kr.eigendecompose(factor)
    assert (eigen.values >= 0).all()
    assert eigen.vectors.isfinite().all()


def test_an_indefinite_factor_has_its_damping_raised_tenfold_and_says_so():
    factor = torch.diag(torch.tensor([1.0, -0.5], dtype=D))[None]
    found = kr.damped_inverse(factor, torch.tensor([0.1], dtype=D))
    assert found.raised == 10
    torch.testing.assert_close(found.matrix[0].diagonal(), torch.tensor([0.5, 2.0], dtype=D))


def test_eigh_that_fails_in_float32_is_tried_in_float64(monkeypatch):
    real = torch.linalg.eigh

    def failing(matrix):
        values, vectors = real(matrix)
        return (values * torch.nan, vectors) if matrix.dtype == torch.float32 else (values, vectors)

    monkeypatch.setattr(kr.torch.linalg, "eigh", failing)
    factor = spd(1, 4).float()
    values, vectors = kr.eigendecompose(factor)
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.transpose(1, 2), factor)


def test_eigh_that_gives_up_in_float32_is_first_tried_there_with_eigenvalues_raised(monkeypatch):
    real, tried = torch.linalg.eigh, []

    def failing(matrix):
        tried.append(matrix.dtype)
        if len(tried) == 1:
            raise torch.linalg.LinAlgError
        return real(matrix)

    monkeypatch.setattr(kr.torch.linalg, "eigh", failing)
    root = torch.randn(2, 40, 3)
    factor = root @ root.transpose(1, 2) * 1e4
    values, vectors = kr.eigendecompose(factor)
    assert tried == [torch.float32] * 2
    largest = float(values.max())
    again = (vectors * values[:, None]) @ vectors.transpose(1, 2)
    torch.testing.assert_close(again, factor, rtol=0, atol=1e-5 * largest)
    assert values[:, :37].max() < 1e-5 * largest
    assert (values >= 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_factor_that_is_not_finite_is_refused(bad):
    factor = torch.full((1, 2, 2), bad)
    with pytest.raises(kr.NotFiniteError):
        kr.eigendecompose(factor)
    with pytest.raises(kr.NotFiniteError):
        kr.damped_inverse(factor, torch.ones(1))


def test_a_factor_of_zeros_gives_the_damping_alone():
    zero = torch.zeros(1, 3, 3, dtype=D)
    assert kr.eigendecompose(zero).values.abs().max() == 0
    da, dg = kr.split_damping(mean_eigenvalue(zero), mean_eigenvalue(zero), 0.25)
    x = torch.ones(1, 3, 3, dtype=D)
    solved = kr.damped_inverse(zero, dg).matrix @ x @ kr.damped_inverse(zero, da).matrix
    torch.testing.assert_close(solved, x / 0.25)
