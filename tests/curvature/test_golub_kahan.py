"""Leading triplets by bidiagonalisation, against a dense decomposition."""

import pytest
import torch
from torch import Tensor

from smallfry.curvature.golub_kahan import Triplets, golub_kahan

D = torch.float64


class Dense:
    """Matrices (groups, left size, right size) with the plain inner products."""

    cancelled = 0.0

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.products = matrix, 0

    def apply(self, dual: Tensor) -> Tensor:
        self.products += 1
        return dual @ self.matrix.transpose(1, 2)

    def adjoint(self, dual: Tensor) -> Tensor:
        self.products += 1
        return dual @ self.matrix

    def left_metric(self, x: Tensor) -> Tensor:
        return x

    right_metric = left_metric

    def left_bound(self, x: Tensor) -> Tensor:
        return x.norm(dim=2)

    right_bound = left_bound


class Weighted(Dense):
    """Coefficients of vectors with Gram matrices L and R: the map is C = M (x R)."""

    cancelled = 1e-7

    def __init__(self, matrix: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__(matrix)
        self.left, self.right = left, right

    def left_metric(self, x: Tensor) -> Tensor:
        return x @ self.left

    def right_metric(self, x: Tensor) -> Tensor:
        return x @ self.right

    def left_bound(self, x: Tensor) -> Tensor:
        return (x**2 * self.left.diagonal(dim1=1, dim2=2)[:, None]).sum(2).mul(x.shape[2]).sqrt()

    def right_bound(self, x: Tensor) -> Tensor:
        return (x**2 * self.right.diagonal(dim1=1, dim2=2)[:, None]).sum(2).mul(x.shape[2]).sqrt()


def spectrum(values, left=9, right=7, groups=1, seed=0):
    """Matrices with given singular values."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(groups):
        u, _ = torch.linalg.qr(torch.randn(left, left, dtype=D, generator=generator))
        v, _ = torch.linalg.qr(torch.randn(right, right, dtype=D, generator=generator))
        count = len(values)
        made.append(u[:, :count] @ torch.diag(torch.tensor(values, dtype=D)) @ v[:, :count].T)
    return torch.stack(made)


def start(groups, block, size, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, block, size, dtype=D, generator=generator)


def require_triplets(matrix, found, rank, tolerance=1e-8):
    values = torch.linalg.svdvals(matrix)[:, :rank]
    torch.testing.assert_close(found.values[:, : values.shape[1]], values, atol=tolerance, rtol=0)
    image = found.left @ matrix
    torch.testing.assert_close(
        image, found.values[:, :, None] * found.right, atol=100 * tolerance, rtol=0
    )
    real = (found.values > 1e-9).to(D)
    for side in (found.left, found.right):
        gram = side @ side.transpose(1, 2) * real[:, :, None] * real[:, None]
        torch.testing.assert_close(gram, torch.diag_embed(real), atol=1e-8, rtol=0)
        assert (side.norm(dim=2) <= 1 + 1e-9).all()  # of a value of zero, any vector or none


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_leading_triplets_are_those_of_a_dense_decomposition(groups, block, rank):
    matrix = spectrum([9.0, 5.0, 4.0, 1.0, 0.3, 0.1], groups=groups)
    found = golub_kahan(Dense(matrix), start(groups, block, 7), rank, 1e-12)
    assert found.residual <= 1e-12
    assert found.values.shape == (groups, rank)
    require_triplets(matrix, found, rank)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 6), (6, 1), (3, 20), (20, 3)])
def test_maps_of_any_shape(sizes):
    matrix = start(2, sizes[0], sizes[1])
    rank = min(sizes)
    found = golub_kahan(Dense(matrix), start(2, 1, sizes[1], seed=1), rank, 1e-12)
    require_triplets(matrix, found, rank)


def test_repeated_values_are_found_by_a_block_of_as_many():
    matrix = spectrum([3.0, 3.0, 3.0, 1.0])
    found = golub_kahan(Dense(matrix), start(1, 3, 7), 3, 1e-12)
    require_triplets(matrix, found, 3)


def test_missing_triplets_are_zero_and_not_nan():
    matrix = spectrum([2.0, 1.0])
    found = golub_kahan(Dense(matrix), start(1, 2, 7), 4, 1e-12)
    assert found.values.shape == (1, 4)
    require_triplets(matrix, found, 4)
    assert (found.values[:, 2:] < 1e-12).all()


def test_a_map_of_zeros_gives_zeros():
    found = golub_kahan(Dense(torch.zeros(2, 4, 3, dtype=D)), start(2, 1, 3), 2, 1e-9)
    assert found.values.abs().max() == 0
    assert found.residual == 0
    assert all(bool(part.isfinite().all()) for part in found[:3])


def test_groups_of_different_size_do_not_disturb_each_other():
    matrix = torch.cat([spectrum([1e8, 1e7]), spectrum([1e-8, 3e-9], seed=1)])
    found = golub_kahan(Dense(matrix), start(2, 2, 7), 2, 1e-10)
    wanted = torch.tensor([[1e8, 1e7], [1e-8, 3e-9]], dtype=D)
    torch.testing.assert_close(found.values, wanted, rtol=1e-8, atol=0)


@pytest.mark.parametrize("known", [1, 2])
def test_locked_triplets_are_not_found_again(known):
    matrix = spectrum([9.0, 5.0, 4.0, 1.0], groups=2)
    all_of_them = golub_kahan(Dense(matrix), start(2, 3, 7), 4, 1e-12)
    locked = Triplets(*(part[:, :known] for part in all_of_them[:3]), residual=all_of_them.residual)
    found = golub_kahan(Dense(matrix), start(2, 2, 7, seed=9), 2, 1e-11, locked)
    torch.testing.assert_close(found.values, all_of_them.values[:, known : known + 2])
    overlap = found.right @ locked.right.transpose(1, 2)
    assert overlap.abs().max() < 1e-9


def test_a_search_of_few_steps_starts_again_from_the_best_vectors():
    values = [1.0 - 0.02 * i for i in range(30)]
    matrix = spectrum(values, left=40, right=36)
    once = golub_kahan(Dense(matrix), start(1, 2, 36), 2, 1e-6, steps=3, restarts=0)
    often = golub_kahan(Dense(matrix), start(1, 2, 36), 2, 1e-6, steps=3, restarts=40)
    assert often.residual < once.residual
    assert (often.values >= once.values - 1e-12).all()
    assert (often.values <= torch.tensor([values[:2]], dtype=D) + 1e-9).all()


def test_a_search_that_has_converged_stops():
    operator = Dense(spectrum([5.0, 1e-3, 1e-4], left=30, right=30))
    golub_kahan(operator, start(1, 1, 30), 1, 1e-3)
    assert operator.products <= 6


def test_vectors_of_another_metric_are_those_of_the_whitened_map():
    left, right = ((lambda x: x @ x.transpose(1, 2))(start(1, n, n, seed=n)) for n in (5, 4))
    middle = start(1, 5, 4)
    found = golub_kahan(Weighted(middle, left, right), start(1, 2, 4, seed=8), 3, 1e-12)
    roots = [torch.linalg.cholesky(each) for each in (left, right)]
    whitened = roots[0].transpose(1, 2) @ middle @ roots[1]
    values = torch.linalg.svdvals(whitened)[:, :3]
    torch.testing.assert_close(found.values, values, rtol=1e-6, atol=0)
    for side, gram in ((found.left, left), (found.right, right)):
        torch.testing.assert_close(
            side @ gram @ side.transpose(1, 2), torch.eye(3, dtype=D)[None], atol=1e-6, rtol=0
        )


def test_a_metric_of_low_rank_gives_no_vectors_of_rounding():
    thin = start(1, 6, 2)
    gram = thin @ thin.transpose(1, 2)
    found = golub_kahan(Weighted(torch.eye(6, dtype=D)[None], gram, gram), start(1, 3, 6), 4, 1e-9)
    assert (found.values[:, :2] > 1e-3).all()
    assert found.values[:, 2:].abs().max() < 1e-6 * found.values.max()


def test_padding_and_cutting_of_triplets():
    found = Triplets(
        torch.tensor([[3.0, 2.0]]), torch.ones(1, 2, 4), torch.ones(1, 2, 5), residual=0.25
    )
    assert found.leading(1).values.tolist() == [[3.0]]
    assert found.leading(1).left.shape == (1, 1, 4)
    longer = found.leading(4)
    assert longer.values.tolist() == [[3.0, 2.0, 0.0, 0.0]]
    assert longer.right.shape == (1, 4, 5)
    assert longer.right[0, 2:].abs().max() == 0
    assert longer.residual == 0.25


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_of_equal_pairs_is_turned_toward_a_vector(sign):
    matrix = spectrum([3.0, 3.0, 1.0])
    found = golub_kahan(Dense(matrix), start(1, 3, 7), 3, 1e-12)
    toward = sign * (found.right[:, 0] + 2 * found.right[:, 1] + 5 * found.right[:, 2])
    turned = found.turned(toward, 1e-6)
    require_triplets(matrix, turned, 3)
    # nearest in the plane of the equal pairs, with its sign
    wanted = sign * (found.right[0, 0] + 2 * found.right[0, 1]) / 5**0.5
    torch.testing.assert_close(turned.right[0, 0], wanted)
    torch.testing.assert_close(turned.right[:, 2], found.right[:, 2])


def test_a_single_leading_pair_only_changes_its_sign():
    matrix = spectrum([3.0, 1.0])
    found = golub_kahan(Dense(matrix), start(1, 2, 7), 2, 1e-12)
    turned = found.turned(-found.right[:, 0], 1e-6)
    torch.testing.assert_close(turned.right[:, 0], -found.right[:, 0])
    torch.testing.assert_close(turned.left[:, 0], -found.left[:, 0])
    same = found.turned(torch.zeros(1, 7, dtype=D), 1e-6)
    assert torch.equal(same.right, found.right)
