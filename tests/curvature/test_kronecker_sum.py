"""Inverses of sums of two Kronecker products against dense ones, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.curvature import kronecker as kr
from smallfry.curvature import kronecker_sum as ks
from smallfry.curvature.kronecker_svd import nearest_terms
from smallfry.curvature.rows import Rows
from smallfry.curvature.terms import Terms

D = torch.float64
SIZES = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))


def problem(groups, inputs, outputs, seed, wild=1.0):
    random = torch.Generator().manual_seed(seed)

    def spd(size):
        x = torch.randn(groups, size, size, dtype=D, generator=random)
        return x @ x.transpose(1, 2) + 0.1 * torch.eye(size, dtype=D)

    def symmetric(size):
        x = wild * torch.randn(groups, size, size, dtype=D, generator=random)
        return x + x.transpose(1, 2)

    x = torch.randn(groups, outputs, inputs, dtype=D, generator=random)
    return spd(inputs), spd(outputs), symmetric(inputs), symmetric(outputs), x


def product(a, b, c, d, x):
    return b @ x @ a + d @ x @ c


@settings(deadline=None, max_examples=50)
@given(SIZES)
def test_it_is_the_inverse_where_no_clamp_is_active(sizes):
    a, b, c, d, x = problem(*sizes, wild=0.02)
    factored = ks.factor_sum(a, b, c, d, floor=1e-9)
    if factored.smallest > 1e-9:
        solved = ks.solve_sum(factored, x)
        torch.testing.assert_close(product(a, b, c, d, solved), x, rtol=1e-7, atol=1e-8)
    eye = torch.eye(sizes[1], dtype=D).expand_as(a)
    torch.testing.assert_close(factored.k1.transpose(1, 2) @ a @ factored.k1, eye)
    diagonal = factored.k1.transpose(1, 2) @ c @ factored.k1
    torch.testing.assert_close(diagonal, torch.diag_embed(factored.s1), rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=50)
@given(SIZES, st.sampled_from([1.0, 1e3]), st.floats(1e-3, 1.0))
def test_it_is_symmetric_and_positive_definite_for_any_correction(sizes, wild, floor):
    a, b, c, d, x = problem(*sizes, wild=wild)
    factored = ks.factor_sum(a, b, c, d, floor)
    y = torch.randn_like(x)
    assert ((x * ks.solve_sum(factored, x)).sum((1, 2)) > 0).all()
    there, back = (y * ks.solve_sum(factored, x)).sum(), (x * ks.solve_sum(factored, y)).sum()
    torch.testing.assert_close(there, back)
    most = 1 + factored.s2[:, :, None] * factored.s1[:, None]
    assert factored.smallest == pytest.approx(float(most.min()))


@settings(deadline=None, max_examples=20)
@given(SIZES)
def test_without_a_correction_it_is_the_single_product(sizes):
    a, b, c, d, x = problem(*sizes)
    expected = torch.linalg.solve(b, x) @ torch.linalg.inv(a)
    solved = ks.solve_sum(ks.factor_sum(a, b, 0 * c, 0 * d), x)
    torch.testing.assert_close(solved, expected)
    terms = Terms(a[None], b[None], torch.ones(1, 1), torch.ones(1))
    found = ks.solve_sum_pcg(terms, x, 0.3, tolerance=1e-12)
    tikhonov = kr.solve_tikhonov(kr.eigendecompose(a), kr.eigendecompose(b), x, 0.3)
    torch.testing.assert_close(found.solution, tikhonov)
    assert found.steps == 1


@settings(deadline=None, max_examples=40)
@given(SIZES, st.floats(1e-2, 10.0), st.integers(1, 3))
def test_conjugate_gradients_solve_with_the_true_damping_or_stop_downhill(sizes, damping, rank):
    groups, inputs, outputs, seed = sizes
    random = torch.Generator().manual_seed(seed)
    rows = Rows(
        torch.randn(groups, 6, 1, inputs, dtype=D, generator=random),
        torch.randn(groups, 1, 6, 1, outputs, dtype=D, generator=random),
    )
    terms = nearest_terms(rows, rank)
    x = torch.randn(groups, outputs, inputs, dtype=D, generator=random)
    pair = ks.first_pair(terms)
    found = ks.solve_sum_pcg(terms, x, damping, pair, tolerance=1e-10, steps=200)
    assert (x * found.solution).sum() > 0
    left = torch.linalg.norm(x - ks.sum_product(terms, found.solution, damping))
    assert found.residual == pytest.approx(float(left / torch.linalg.norm(x)), abs=1e-8)
    if not found.indefinite:
        assert found.residual <= 1e-10


def test_negative_curvature_ends_the_iteration_with_a_descent_direction():
    eye = torch.eye(2, dtype=D)[None]
    terms = Terms(
        torch.stack([eye, eye]), torch.stack([eye, -5 * eye]), torch.ones(1, 2), torch.ones(1)
    )
    x = torch.ones(1, 2, 2, dtype=D)
    found = ks.solve_sum_pcg(terms, x, 0.1)
    assert found.indefinite
    assert (found.solution * x).sum() > 0
    assert ks.solve_sum_pcg(terms, 0 * x, 0.1).solution.abs().max() == 0


def test_float32_factors_of_low_rank_and_bad_scale_are_solved_with():
    random = torch.Generator().manual_seed(0)
    root = torch.randn(1, 300, 4, generator=random) * 1e-2
    low = root @ root.transpose(1, 2)
    a = low + 1e-7 * torch.eye(300)
    c = root @ torch.diag(torch.tensor([1.0, -1.0, 0.5, -2.0])) @ root.transpose(1, 2)
    x = torch.randn(1, 300, 300, generator=random)
    solved = ks.solve_sum(ks.factor_sum(a, a, c, c), x)
    assert solved.isfinite().all()
    assert (solved * x).sum() > 0
    indefinite = low - 1e-7 * torch.eye(300)  # as rounding may leave it
    solved = ks.solve_sum(ks.factor_sum(indefinite, a, c, c), x)
    assert solved.isfinite().all()
    assert (solved * x).sum() > 0
    nothing = torch.zeros(1, 3, 3)
    assert (
        ks.solve_sum(ks.factor_sum(nothing, nothing, nothing, nothing), x[:, :3, :3])
        .isfinite()
        .all()
    )


def test_eigh_that_fails_in_float32_is_tried_in_float64(monkeypatch):
    real = torch.linalg.eigh

    def failing(matrix):
        values, vectors = real(matrix)
        return (values * torch.nan, vectors) if matrix.dtype == torch.float32 else (values, vectors)

    a, b, c, d, x = (t.float() for t in problem(1, 4, 3, 0, wild=0.02))
    good = ks.solve_sum(ks.factor_sum(a, b, c, d), x)
    monkeypatch.setattr(ks.torch.linalg, "eigh", failing)
    torch.testing.assert_close(
        ks.solve_sum(ks.factor_sum(a, b, c, d), x), good, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad):
    a, b, c, d, _ = problem(1, 3, 3, 0)
    with pytest.raises(kr.NotFiniteError, match="not finite"):
        ks.factor_sum(a, b, c * bad, d)
    with pytest.raises(kr.NotFiniteError, match="not finite"):
        ks.factor_sum(a * bad, b, c, d)
