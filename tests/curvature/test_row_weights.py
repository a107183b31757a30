"""Row weights and scales, inferred from the gradients of a loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from smallfry.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from smallfry.curvature.loss_scale import infer_scale, rounding_of_probabilities
from smallfry.curvature.row_weights import (
    RowWeights,
    certain_rows,
    common_weight,
    given_weights,
    read_weights,
    rounding_of,
    with_certain_rows,
)

D = torch.float64


def gradient(z, loss):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 9), st.integers(2, 12), st.integers(0, 10**6), st.floats(0.01, 100))
def test_any_weights_of_certain_targets_are_read(classes, samples, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, classes, dtype=D, generator=generator)
    y = torch.randint(classes, (samples,), generator=generator)
    weights = scale * (0.1 + torch.rand(samples, dtype=D, generator=generator))
    g = gradient(z, lambda z: (weights * F.cross_entropy(z, y, reduction="none")).sum())
    found = Categorical().row_weights((z,), 0, g)
    torch.testing.assert_close(found.values.flatten() * found.unit, weights)
    assert found.unit == pytest.approx(float(weights.mean()))
    assert float(found.values.mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_weights_are_none(reduction):
    z, y = torch.randn(6, 4, dtype=D), torch.arange(6) % 4
    g = gradient(z, lambda z: F.cross_entropy(z, y, reduction=reduction))
    found = Categorical().row_weights((z,), 0, g)
    assert found.values is None
    assert found.unit == pytest.approx(1 if reduction == "sum" else 1 / 6)


@pytest.mark.parametrize("form", ["last", "first"])
def test_class_weights_of_positions_are_read_in_either_form(form):
    torch.manual_seed(0)
    z, y = torch.randn(2, 5, 3, dtype=D), torch.randint(3, (2, 5))
    classes = torch.tensor([1.0, 2.0, 5.0], dtype=D)
    if form == "first":
        z = z.transpose(1, 2).contiguous()
    g = gradient(z, lambda z: F.cross_entropy(
        z if form == "first" else z.transpose(1, 2), y, classes, reduction="sum"))  # fmt: skip
    found = Categorical().row_weights((z,), 0, g)
    wanted = classes[y]
    dim = 1 if form == "first" else -1
    torch.testing.assert_close(found.values.squeeze(dim) * found.unit, wanted)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_soft_targets_hide_the_weights(smoothing):
    z, y = torch.randn(8, 4, dtype=D), torch.arange(8) % 4
    g = gradient(z, lambda z: F.cross_entropy(z, y, label_smoothing=smoothing))
    assert Categorical().row_weights((z,), 0, g) == RowWeights(None, None)


def test_a_loss_without_rows_has_none():
    z = torch.randn(3, 4)
    assert Categorical().row_weights((z,), 0, torch.zeros_like(z)) is None
    assert Bernoulli(hard=True).row_weights((z,), 0, torch.zeros_like(z)) is None
    assert Gaussian(masked=True).row_weights((z,), 0, torch.zeros_like(z)) is None
    assert Gaussian().row_weights((z,), 0, torch.zeros_like(z)) == RowWeights(None, None)


def test_weights_of_binary_outputs_are_read_where_targets_are_certain():
    torch.manual_seed(0)
    z, y = torch.randn(5, 3, dtype=D), torch.randint(2, (5, 3)).to(D)
    weights = 0.5 + torch.rand(5, 3, dtype=D)
    g = gradient(z, lambda z: F.binary_cross_entropy_with_logits(z, y, weights, reduction="sum"))
    found = Bernoulli(hard=True).row_weights((z,), 0, g)
    torch.testing.assert_close(found.values * found.unit, weights)
    p = z.sigmoid()
    g = gradient(p, lambda p: F.binary_cross_entropy(p, y, weights, reduction="sum"))
    found = Bernoulli("probabilities", hard=True).row_weights((p,), 0, g)
    torch.testing.assert_close(found.values * found.unit, weights)


def test_the_common_weight_trusts_rows_of_little_rounding():
    rho = torch.tensor([1.0, 1.0, 1.3])
    assert common_weight(rho, torch.tensor([0.0, 0.0, 0.4])) == pytest.approx(1.0, rel=1e-3)
    assert common_weight(rho, torch.zeros(3)) is None
    assert common_weight(torch.empty(0), torch.empty(0)) is None
    assert common_weight(torch.tensor([2.0]), torch.tensor([0.0])) == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_bounded(dtype):
    numbers = torch.cat([torch.randn(500, dtype=D), 1e-9 * torch.randn(500, dtype=D)])
    error = (numbers.to(dtype).double() - numbers).abs()
    assert (error <= rounding_of(numbers, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_probabilities_of_a_row_add_up_to_one_but_for_rounding(dtype, classes, size):
    torch.manual_seed(0)
    z = (size * torch.randn(200, classes, dtype=D)).to(dtype)
    exact = z.to(D).softmax(-1)
    log = z.log_softmax(-1)
    bound = rounding_of_probabilities(z, classes)
    assert (log.exp().to(D).sum(-1) - 1).abs().max() <= bound
    assert ((log.to(D).exp() - exact).abs().sum(-1)).max() <= 2 * bound
    assert bound < 0.1 or dtype == torch.bfloat16


@pytest.mark.parametrize(("counts", "values"), [([True, True], None), ([True, False], [1.0, 0.0])])
def test_uncertain_rows_count_or_not(counts, values):
    found = read_weights(torch.tensor([3.0, 5.0]), torch.tensor(counts), certain=False)
    assert found.unit is None
    assert (found.values if found.values is None else found.values.tolist()) == values


def test_certain_rows_have_their_weights():
    counts = torch.tensor([True, True, False])
    found = read_weights(torch.tensor([3.0, 1.0, 9.0]), counts, certain=True)
    assert found.unit == 2.0
    assert found.values.tolist() == [1.5, 0.5, 0.0]
    assert read_weights(torch.ones(2), torch.zeros(2, dtype=torch.bool), certain=True) is None
    assert found.of_samples(3).tolist() == [1.5, 0.5, 0.0]
    assert RowWeights(None, 1.0).of_samples(3) is None


def test_rows_of_no_curvature_count_beside_others():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    found = with_certain_rows(RowWeights(torch.tensor([0.0, 0.0, 1.0]), 1.0), p, torch.float32)
    assert found.values.tolist() == [1.0, 0.0, 1.0]
    found = with_certain_rows(RowWeights(torch.tensor([0.0, 1.0, 1.0]), 1.0), p, torch.float32)
    assert found.values is None
    assert with_certain_rows(None, p, torch.float32) is None
    assert with_certain_rows(RowWeights(None, 1.0), p, torch.float32).unit == 1.0


def test_certain_targets_are_told_from_soft_ones():
    torch.manual_seed(0)
    z = torch.randn(4, 5, dtype=D)
    p, y = z.softmax(-1), F.one_hot(torch.arange(4), 5).to(D)
    hard = certain_rows(p, 0.25 * (p - y), D)
    assert hard.fits.all()
    torch.testing.assert_close(hard.rho, torch.full((4,), 0.25, dtype=D))
    soft = certain_rows(p, 0.25 * (p - 0.9 * y - 0.02), D)
    assert not soft.fits[soft.telling].any()
    assert soft.telling.all()


SHAPES = {
    "samples": ((4,), (4, 3), -1),
    "rows": ((4, 2), (4, 2, 3), -1),
    "rows, classes first": ((4, 2), (4, 3, 2), 1),
    "samples of rows": ((4,), (4, 2, 3), -1),
    "outputs": ((4, 3), (4, 3), None),
    "samples of outputs": ((4,), (4, 3), None),
}


@pytest.mark.parametrize("case", SHAPES)
def test_stated_weights_fit_the_output(case):
    shape, output, classes = SHAPES[case]
    weights = torch.rand(shape, dtype=D) + 0.1
    found = given_weights(weights, torch.zeros(output), classes)
    assert found.given
    assert found.values.dtype == torch.float32
    whole = (found.values * found.unit).expand(output)
    assert float(found.values[found.values > 0].mean()) == pytest.approx(1.0)
    if len(shape) == 1:
        rows = whole.reshape(4, -1)
        torch.testing.assert_close(rows, weights[:, None].float().expand_as(rows))
    else:
        one = whole if classes is None else whole.select(classes, 0)
        torch.testing.assert_close(one, weights.float())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"weights of shape \(3,\) for an output of shape \(4, 2\)"),
        (torch.ones(2, 4), "expected"),
        (-torch.ones(4), "finite, non-negative, and not all zero"),
        (torch.zeros(4), "not all zero"),
        (torch.tensor([1.0, 1, 1, math.inf]), "finite"),
        (torch.tensor([1.0, 1, 1, math.nan]), "finite"),
    ],
)
def test_stated_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        given_weights(weights, torch.zeros(4, 2), -1)


def scale_of(ratios, expected=None, rounding=0.0):
    expected = torch.full((len(ratios),), 0.5) if expected is None else torch.tensor(expected)
    return infer_scale(torch.tensor(ratios) * expected, expected, rounding)


def test_the_scale_is_the_largest_ratio():
    assert scale_of([3.0, 3.0, 3.0]) == (3.0, True, True, True)
    assert scale_of([3.0, 1.0, 1.0]) == (3.0, False, True, False)
    assert scale_of([3.0, 3.0, 1.0]) == (3.0, True, True, False)
    assert scale_of([-1.0, 2.0])[0] == 2.0


def test_there_is_no_scale_of_rounding_or_nothing():
    assert scale_of([]) is None
    assert scale_of([-1.0]) is None
    assert scale_of([math.nan, 1.0]) is None
    assert scale_of([1e-8, 2e-8], rounding=1e-7) is None
    assert scale_of([1e-8, 1.0], rounding=1e-7).even


def test_predictions_of_one_tell_nothing_of_the_targets():
    assert not scale_of([0.1, 0.1], expected=[1.0, 0.999]).hard
    assert scale_of([0.1, 0.1], expected=[1.0, 0.5]).hard
