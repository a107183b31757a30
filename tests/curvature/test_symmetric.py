"""Symmetric products at half the arithmetic, against plain products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.curvature import symmetric
from smallfry.curvature.symmetric import quadratic_forms, random_symmetric, symmetric_product

SIZES = [1, 2, 7, 8, 9, 16, 23]


@pytest.fixture(autouse=True, params=[4, 160], ids=["blocks", "whole"])
def block(request, monkeypatch):
    monkeypatch.setattr(symmetric, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_gram_matrix_is_the_plain_product_and_symmetric(groups, size):
    x = torch.randn(groups, 5, size, dtype=torch.float64)
    found = symmetric_product(x, x)
    torch.testing.assert_close(found, x.transpose(1, 2) @ x)
    assert torch.equal(found, found.transpose(1, 2))


@pytest.mark.parametrize("size", SIZES)
def test_a_diagonal_or_symmetric_middle_counts(size):
    x = torch.randn(2, 6, size, dtype=torch.float64)
    weights = torch.randn(2, 6, 1, dtype=torch.float64)
    torch.testing.assert_close(symmetric_product(x, weights * x), x.transpose(1, 2) @ (weights * x))
    middle = torch.randn(2, 6, 6, dtype=torch.float64)
    middle = middle + middle.transpose(1, 2)
    found = symmetric_product(x, middle @ x)
    torch.testing.assert_close(found, x.transpose(1, 2) @ middle @ x)
    assert torch.equal(found, found.transpose(1, 2))


@pytest.mark.parametrize("size", SIZES)
def test_a_given_result_is_written_to(size):
    x, out = torch.randn(2, 3, size), torch.full((2, size, size), torch.nan)
    assert symmetric_product(x, x, out) is out
    torch.testing.assert_close(out, x.transpose(1, 2) @ x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_no_rows_give_zeros_and_one_row_its_square(rows, size):
    x = torch.randn(1, rows, size)
    torch.testing.assert_close(symmetric_product(x, x), x.transpose(1, 2) @ x)


@pytest.mark.parametrize("size", SIZES)
def test_strides_of_memory_do_not_matter(size):
    x = torch.randn(2, size, 5).transpose(1, 2)
    assert size == 1 or not x.is_contiguous()
    torch.testing.assert_close(symmetric_product(x, x), x.transpose(1, 2) @ x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype):
    x = torch.randn(1, 5, 9).to(dtype)
    found = symmetric_product(x, x)
    assert found.dtype == dtype
    assert quadratic_forms(x, found).dtype == dtype


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(0, 6), st.integers(1, 24), st.integers(0, 2**31))
def test_quadratic_forms_are_those_of_each_row(groups, rows, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, rows, size, dtype=torch.float64, generator=generator)
    matrix = torch.randn(groups, size, size, dtype=torch.float64, generator=generator)
    matrix = matrix + matrix.transpose(1, 2)
    wanted = torch.einsum("gri,gij,grj->gr", x, matrix, x)
    torch.testing.assert_close(quadratic_forms(x, matrix), wanted)


@pytest.mark.parametrize("size", [1, 4])
def test_random_matrices_are_symmetric_of_length_one_and_always_the_same(size):
    like = torch.zeros(1, dtype=torch.float64)
    found = random_symmetric(2, 3, size, like)
    assert found.shape == (2, 3, size, size)
    assert torch.equal(found, found.transpose(2, 3))
    torch.testing.assert_close(found.flatten(2).norm(dim=2), torch.ones(2, 3).double())
    torch.manual_seed(5)
    assert torch.equal(found, random_symmetric(2, 3, size, like))
    assert torch.get_rng_state().equal(torch.manual_seed(5).get_state())
