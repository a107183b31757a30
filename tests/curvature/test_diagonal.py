"""Diagonals in whole and in partial bases against dense matrices, in float64."""

import pytest
import torch
from best_scale import best_scale
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank_average import average

from smallfry.curvature import diagonal as dg
from smallfry.curvature import kronecker as kr
from smallfry.curvature.rows import Rows

D = torch.float64


@st.composite
def problems(draw, most=6):
    """Rows with orthonormal vectors of both sides, whole or a few of them."""
    groups, draws, samples = (draw(st.integers(1, n)) for n in (2, 2, 4))
    uses, outputs, inputs = (draw(st.integers(1, most)) for _ in range(3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows = make(groups, draws, samples, uses, outputs, inputs, random)
    qa = vectors(groups, inputs, draw(st.integers(1, inputs)), random)
    qg = vectors(groups, outputs, draw(st.integers(1, outputs)), random)
    return rows, qa, qg, random


def make(groups, draws, samples, uses, outputs, inputs, random):
    return Rows(
        torch.randn(groups, samples, uses, inputs, dtype=D, generator=random),
        torch.randn(groups, draws, samples, uses, outputs, dtype=D, generator=random),
    )


def vectors(groups, size, kept, random):
    return torch.linalg.qr(torch.randn(groups, size, kept, dtype=D, generator=random)).Q


def projectors(q):
    """(groups, entries, size, size): one for each vector, and one for all that they leave."""
    each = torch.einsum("hik,hjk->hkij", q, q)
    rest = torch.eye(q.shape[1], dtype=D) - each.sum(1, keepdim=True)
    return torch.cat([each, rest], 1) if q.shape[1] > q.shape[2] else each


def products(qa, qg):
    """(groups, entries of outputs, of inputs, size, size), on row-major matrices."""
    both = torch.einsum("hiac,hjbd->hijabcd", projectors(qg), projectors(qa))
    return both.flatten(5, 6).flatten(3, 4)


def dense(values, qa, qg):
    return torch.einsum("hij,hijxy->hxy", values, products(qa, qg))


def fisher(rows):
    w = torch.einsum("hknto,hnti->hknoi", rows.gradients, rows.inputs).flatten(3).flatten(1, 2)
    return w.transpose(1, 2) @ w / rows.samples


def counts(qa, qg):
    return products(qa, qg).diagonal(dim1=3, dim2=4).sum(3)


def projected(matrix, qa, qg):
    """The nearest operator's values: tr(M (Q ⊗ P)) over the directions of Q ⊗ P."""
    return torch.einsum("hxy,hijxy->hij", matrix, products(qa, qg)) / counts(qa, qg)


@settings(deadline=None, max_examples=100)
@given(problems())
def test_second_moments_are_the_projection_of_the_fisher_and_keep_its_trace(problem):
    rows, qa, qg, _ = problem
    found = dg.basis_second_moments(rows, qa, qg, chunk=2)
    torch.testing.assert_close(found, projected(fisher(rows), qa, qg))
    assert bool((found >= 0).all())
    multiplicities = dg.multiplicities(found, qg.shape[1], qa.shape[1])
    torch.testing.assert_close(multiplicities, counts(qa, qg)[0])
    w = torch.einsum("hknto,hnti->hknoi", rows.gradients, rows.inputs)
    torch.testing.assert_close((found * multiplicities).sum(), (w**2).sum() / rows.samples)


@pytest.mark.parametrize("uses", [2, 40])
def test_both_ways_to_the_tails_of_a_shared_weight_agree(uses):
    random = torch.Generator().manual_seed(uses)
    rows = make(1, 2, 3, uses, 12, 20, random)
    for kept_a, kept_g in ((4, 4), (20, 4), (4, 12)):
        qa, qg = vectors(1, 20, kept_a, random), vectors(1, 12, kept_g, random)
        found = dg.basis_second_moments(rows, qa, qg, chunk=2)
        torch.testing.assert_close(found, projected(fisher(rows), qa, qg))


@settings(deadline=None, max_examples=100)
@given(problems(), st.floats(1e-4, 1e4))
def test_solving_is_the_dense_solve_and_descends(problem, damping):
    rows, qa, qg, random = problem
    s = dg.basis_second_moments(rows, qa, qg)
    x = torch.randn(len(s), qg.shape[1], qa.shape[1], dtype=D, generator=random)
    found = dg.solve_diagonal(qa, qg, s, x, damping)
    damped = dense(s, qa, qg) + damping * torch.eye(x[0].numel(), dtype=D)
    expected = torch.linalg.solve(damped, x.flatten(1))
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-7, atol=1e-7 / damping)
    assert float((found * x).sum()) > 0


@settings(deadline=None, max_examples=50)
@given(problems())
def test_errors_are_those_of_the_dense_operator(problem):
    rows, qa, qg, _ = problem
    values = dg.basis_second_moments(rows, qa, qg) + 0.1
    exact = fisher(rows)
    expected = float((exact - dense(values, qa, qg)).norm() / exact.norm())
    assert dg.diagonal_error(rows, qa, qg, values) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_no_product_of_factors_with_these_vectors_is_nearer(seed, uses):
    random = torch.Generator().manual_seed(seed)
    rows = make(1, 2, 15, uses, 12, 20, random)
    sides = rows.inputs.flatten(1, 2), rows.gradients.flatten(1, 3)
    a, g = (average(None, side / len(side[0]) ** 0.5, 0.0, 4, random) for side in sides)
    mine = dg.basis_second_moments(rows, a.vectors, g.vectors)
    error = dg.diagonal_error(rows, a.vectors, g.vectors, mine)
    scaled = a.dense() * best_scale(rows, a.dense(), g.dense())
    assert error <= kr.kronecker_error(rows, scaled, g.dense()) + 1e-9


@settings(deadline=None, max_examples=100)
@given(problems(), st.booleans())
def test_a_diagonal_keeps_its_operator_when_the_basis_turns(problem, same):
    rows, qa, qg, random = problem
    old = dg.basis_second_moments(rows, qa, qg)
    new_a, new_g = (q if same else vectors(*q.shape, random) for q in (qa, qg))
    moved = dg.overlaps(new_g, qg) @ old @ dg.overlaps(new_a, qa).transpose(1, 2)
    expected = old if same else projected(dense(old, qa, qg), new_a, new_g)
    torch.testing.assert_close(moved, expected)
    number = counts(qa, qg)
    torch.testing.assert_close((moved * number).sum((1, 2)), (old * number).sum((1, 2)))
