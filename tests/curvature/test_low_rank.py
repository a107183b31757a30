import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from low_rank_average import average

from smallfry.curvature.kronecker import NotFiniteError
from smallfry.curvature.low_rank import (
    LowRank,
    compress,
    pencil_side,
    solve_pencil,
    solve_sides,
)

D = torch.float64


def generator():
    return torch.Generator().manual_seed(0)


def rows_of(rank, count=60, size=30, groups=2, flat=0.0):
    """Rows of which ``rank`` directions tell most."""
    random = torch.Generator().manual_seed(rank)
    strong = torch.randn(groups, count, rank, generator=random, dtype=D)
    basis = torch.linalg.qr(torch.randn(groups, size, size, generator=random, dtype=D)).Q
    weak = torch.randn(groups, count, size, generator=random, dtype=D) * flat
    return strong @ basis[:, :rank] + weak


def test_a_factor_of_that_rank_is_kept_exactly():
    rows = rows_of(5)
    factor = average(None, rows, 0.0, 5, generator())
    torch.testing.assert_close(factor.dense(), rows.mT @ rows)
    assert float(factor.tail.abs().max()) < 1e-10


@given(flat=st.floats(0, 1), rank=st.integers(1, 12), keep=st.floats(0, 0.99))
def test_the_trace_is_exact_and_no_eigenvalue_negative(flat, rank, keep):
    rows = rows_of(4, flat=flat)
    old = average(None, rows, 0.0, rank, generator())
    torch.testing.assert_close(old.trace, (rows**2).sum((1, 2)))
    more = rows_of(3, flat=flat)
    new = average(old, more, keep, rank, generator())
    torch.testing.assert_close(new.trace, keep * old.trace + (1 - keep) * (more**2).sum((1, 2)))
    assert bool((new.values >= 0).all())
    assert bool((new.tail >= 0).all())
    identity = torch.eye(rank, dtype=D).expand(2, -1, -1)
    torch.testing.assert_close(new.vectors.mT @ new.vectors, identity)


def test_an_average_over_many_batches_stays_near_the_explicit_one():
    old, explicit = None, 0
    for step in range(12):
        rows = rows_of(4, flat=0.05) * (1 + step / 12)
        share = 0.9 if step else 0.0
        explicit = share * explicit + (1 - share) * (rows.mT @ rows)
        old = average(old, rows, share, 6, generator())
    error = torch.linalg.matrix_norm(old.dense() - explicit) / torch.linalg.matrix_norm(explicit)
    assert float(error.max()) < 0.02
    best = torch.linalg.eigvalsh(explicit)[:, -4:]
    torch.testing.assert_close(old.values[:, -4:], best, rtol=0.02, atol=0)


def test_a_direction_that_appears_later_is_found():
    old = average(None, rows_of(3), 0.0, 4, generator())
    new = torch.zeros(2, 60, 30, dtype=D)
    new[..., 7] = 3.0
    found = average(old, new, 0.5, 4, generator())
    expected = 0.5 * old.dense() + 0.5 * new.mT @ new
    torch.testing.assert_close(found.dense(), expected, rtol=1e-6, atol=1e-6)


def test_solving_is_multiplying_with_the_damped_inverses():
    a = average(None, rows_of(4, flat=0.1), 0.0, 5, generator())
    g = average(None, rows_of(3, size=20, flat=0.1), 0.0, 6, generator())
    da, dg = torch.tensor([0.3, 2.0], dtype=D), torch.tensor([0.1, 0.5], dtype=D)
    x = torch.randn(2, 20, 30, dtype=D)

    def inverse(factor, damping):
        size = factor.vectors.shape[1]
        return torch.linalg.inv(factor.dense() + damping[:, None, None] * torch.eye(size, dtype=D))

    ia, ig = inverse(a, da), inverse(g, dg)
    torch.testing.assert_close(solve_sides(a, g, x, da, dg), ig @ x @ ia)
    torch.testing.assert_close(solve_sides(a, None, x, da, dg), x @ ia)
    torch.testing.assert_close(solve_sides(None, g, x, da, dg), ig @ x)
    torch.testing.assert_close(a.times(x.mT), a.dense() @ x.mT)


def test_rows_of_zeros_and_of_nothing_finite():
    zero = average(None, torch.zeros(1, 4, 9), 0.0, 2, generator())
    assert isinstance(zero, LowRank)
    assert float(zero.dense().abs().max()) == 0
    with pytest.raises(NotFiniteError):
        average(None, torch.full((1, 4, 9), float("nan")), 0.0, 2, generator())


def test_a_pencil_is_inverted_where_no_floor_is_needed_and_positive_always():
    random = torch.Generator().manual_seed(3)

    def side(size, strength):
        first = average(None, rows_of(4, size=size, flat=0.1), 0.0, 5, generator())
        root = torch.randn(2, size, 3, generator=random, dtype=D)
        signs = torch.tensor([1.0, -1.0, 1.0], dtype=D) * strength
        second = (root * signs) @ root.mT
        return first, compress(second, 3, generator(), signed=True), second

    x = torch.randn(2, 20, 30, generator=random, dtype=D)
    for strength, safe in ((0.002, True), (50.0, False)):
        (a, c, dense_c), (g, d, dense_d) = side(30, strength), side(20, strength)
        torch.testing.assert_close(c.dense(), dense_c)
        da, dg = torch.tensor([0.3, 2.0], dtype=D), torch.tensor([0.1, 0.5], dtype=D)
        found = solve_pencil(pencil_side(a, da, c), pencil_side(g, dg, d), x, 0.05)
        assert bool(((found * x).sum((1, 2)) > 0).all())
        if safe:
            first_a = a.dense() + da[:, None, None] * torch.eye(30, dtype=D)
            first_g = g.dense() + dg[:, None, None] * torch.eye(20, dtype=D)
            made = first_g @ found @ first_a + dense_d @ found @ dense_c
            torch.testing.assert_close(made, x)
