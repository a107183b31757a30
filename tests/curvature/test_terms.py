"""Sums of Kronecker products against dense matrices, and rows of several batches as one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.curvature.rows import Rows
from smallfry.curvature.terms import Terms, expanded, joined, terms_error

D = torch.float64
SIZES = st.tuples(
    *(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6)),
)


def rows_of(groups, draws, samples, uses, inputs, outputs, seed):
    random = torch.Generator().manual_seed(seed)
    return Rows(
        torch.randn(groups, samples, uses, inputs, dtype=D, generator=random),
        torch.randn(groups, draws, samples, uses, outputs, dtype=D, generator=random),
    )


def dense(rows):
    """F = 1/N Σ vec(W) vec(W)ᵀ of each group, with vec stacking columns."""
    w = torch.einsum("hknto,hnti->hknio", rows.gradients, rows.inputs)
    flat = w.flatten(3).flatten(1, 2)
    return flat.transpose(1, 2) @ flat / rows.samples


def terms_of(groups, rank, inputs, outputs, seed):
    random = torch.Generator().manual_seed(seed + 1)

    def symmetric(size):
        x = torch.randn(rank, groups, size, size, dtype=D, generator=random)
        return x + x.transpose(2, 3)

    r, s = symmetric(inputs), symmetric(outputs)
    values = torch.ones(groups, rank, dtype=D)
    return Terms(r, s, values, torch.ones(groups, dtype=D))


def dense_terms(terms):
    return sum(
        torch.stack([torch.kron(a, g) for a, g in zip(r, s, strict=True)])
        for r, s in zip(terms.inputs, terms.outputs, strict=True)
    )


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 3))
def test_the_error_of_any_terms_is_that_of_dense_matrices(sizes, rank):
    groups, draws, samples, uses, inputs, outputs, seed = sizes
    rows = rows_of(groups, draws, samples, uses, inputs, outputs, seed)
    terms = terms_of(groups, rank, inputs, outputs, seed)
    fisher = dense(rows)
    block = torch.stack([torch.block_diag(*fisher)])
    approximation = torch.stack([torch.block_diag(*dense_terms(terms))])
    expected = (block - approximation).norm() / block.norm()
    torch.testing.assert_close(
        torch.tensor(terms_error(rows, terms), dtype=D), expected, rtol=1e-6, atol=1e-7
    )


def test_terms_that_are_the_fisher_have_no_error():
    rows = rows_of(1, 1, 1, 1, 3, 2, 0)  # of one sample and use, F = a aᵀ ⊗ g gᵀ
    a, g = rows.inputs[:, 0, 0], rows.gradients[:, 0, 0, 0]
    one = Terms(
        (a[:, :, None] * a[:, None])[None],
        (g[:, :, None] * g[:, None])[None],
        torch.ones(1, 1, dtype=D),
        torch.ones(1, dtype=D),
    )
    assert terms_error(rows, one) < 1e-7


def test_the_leading_terms_are_those_of_the_largest_values():
    terms = terms_of(2, 3, 2, 2, 0)._replace(values=torch.tensor([[3.0, 2, 1]] * 2, dtype=D))
    some = terms.leading(2)
    assert (terms.rank, some.rank) == (3, 2)
    assert torch.equal(some.inputs, terms.inputs[:2])
    assert some.values.tolist() == [[3.0, 2.0]] * 2
    assert some.products.inputs is some.inputs


def test_the_error_of_nearest_terms_is_what_their_values_miss():
    terms = terms_of(1, 2, 2, 2, 0)._replace(
        values=torch.tensor([[4.0, 3.0]], dtype=D), squared_norm=torch.tensor([50.0], dtype=D)
    )
    assert abs(terms.error - (25 / 50) ** 0.5) < 1e-12


def test_sides_are_the_flattened_matrices():
    terms = terms_of(2, 3, 2, 4, 0)
    inputs, outputs = terms.products.sides
    assert inputs.shape == (2, 3, 4)
    assert outputs.shape == (2, 3, 16)
    assert torch.equal(inputs[1, 2].view(2, 2), terms.inputs[2, 1])


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES)
def test_joined_batches_have_the_mean_of_their_fishers(first, second):
    groups, _, _, _, inputs, outputs, _ = first
    parts = [
        rows_of(groups, draws, samples, uses, inputs, outputs, seed)
        for _, draws, samples, uses, _, _, seed in (first, second)
    ]
    both = joined(parts)
    assert both.samples == sum(part.samples for part in parts)
    expected = sum(dense(part) * part.samples for part in parts) / both.samples
    torch.testing.assert_close(dense(both), expected)


def test_a_single_batch_stays_as_it_is():
    rows = rows_of(1, 2, 3, 2, 2, 2, 0)
    assert joined([rows]) is rows


@settings(deadline=None, max_examples=40)
@given(SIZES)
def test_uses_as_samples_lose_what_they_have_in_common(sizes):
    rows = rows_of(*sizes)
    found = expanded([rows])
    assert (found.samples, found.uses) == (rows.samples * rows.uses, 1)
    single = torch.einsum("hknto,hnti->hkntio", rows.gradients, rows.inputs)
    flat = single.flatten(4).flatten(1, 3)
    torch.testing.assert_close(dense(found), flat.transpose(1, 2) @ flat / rows.samples)
    if rows.uses == 1:
        torch.testing.assert_close(dense(found), dense(rows))
