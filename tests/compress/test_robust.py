"""Penalties of robust sparsity: goldens, bounds, scale and gradients."""

import math

import pytest
import torch
from pruning_golden import GOLDEN
from torch import nn

from smallfry import compress
from smallfry.compress.sparse.robust import (
    log_am_gm,
    log_condition,
    log_condition_bound,
    transformed_l1,
)
from smallfry.errors import UsageError
from smallfry.training.method import Running, Setting
from smallfry.transforms import ModelSpec

ENTRY = GOLDEN["robust_sparsity"]


def golden_matrix():
    i = torch.arange(20, dtype=torch.float64)
    return torch.sin(0.37 * i + 0.11 * 12 + 0.2).view(5, 4)


def test_the_goldens_are_met():
    matrix = golden_matrix()
    for a, key in ((1.0, "transformed_l1_a1"), (0.1, "transformed_l1_a01")):
        assert float(transformed_l1(matrix, a)) == pytest.approx(ENTRY[key], abs=1e-9)
    values = torch.linalg.svdvals(matrix)
    expected = torch.tensor(ENTRY["singular_values"], dtype=torch.float64)
    torch.testing.assert_close(values, expected, atol=1e-9, rtol=0)
    # the matrix has rank 2, so that logarithms of its last values are those of rounding errors;
    # what the two surrogates have in common is exact
    apart = ENTRY["gej_bound_log"] - ENTRY["log_am_gm"]
    assert apart == pytest.approx(math.log(2), abs=1e-9)
    assert float(log_condition(matrix)) > 30
    assert float(log_condition_bound(matrix) - log_am_gm(matrix)) == pytest.approx(apart, abs=1e-9)


def test_surrogates_equal_their_formulas_of_singular_values():
    torch.manual_seed(0)
    for shape in ((5, 4), (3, 7), (6, 6), (4, 2, 3)):
        matrix = torch.randn(shape, dtype=torch.float64)
        values = torch.linalg.svdvals(matrix.flatten(1))
        rank, logs = len(values), values.log()
        am_gm = rank / 2 * values.square().mean().log() - logs.sum()
        norm = matrix.norm()
        gej = math.log(2) - logs.sum() + rank * (norm / math.sqrt(rank)).log()
        torch.testing.assert_close(log_am_gm(matrix, 0.0), am_gm, atol=1e-9, rtol=0)
        torch.testing.assert_close(log_condition_bound(matrix, 0.0), gej, atol=1e-9, rtol=0)
        assert float(log_condition(matrix)) == pytest.approx(float(logs[0] - logs[-1]), abs=1e-9)


def test_the_bound_holds_for_4000_random_matrices_of_any_scale():
    torch.manual_seed(0)
    for _ in range(4000):
        rows, columns = torch.randint(2, 9, (2,)).tolist()
        matrix = torch.randn(rows, columns, dtype=torch.float64)
        bound = log_condition_bound(matrix, 0.0)
        assert bound >= log_condition(matrix) - 1e-9
        assert log_am_gm(matrix, 0.0) >= -1e-9
    for measure in (log_condition_bound, log_am_gm, log_condition):
        torch.testing.assert_close(measure(matrix), measure(1e3 * matrix), atol=1e-8, rtol=0)
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert log_am_gm(turned, 0.0).abs() < 1e-9


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    matrix = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for measure in (log_am_gm, log_condition_bound, log_condition, transformed_l1):
        assert torch.autograd.gradcheck(measure, (matrix,))
    zero = torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(transformed_l1(zero), zero)
    assert not gradient.any()


@pytest.mark.parametrize("surrogate", ["gej", "am_gm", "exact"])
def test_penalties_lower_what_they_measure(surrogate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    methods = [compress.ConditionNumber(1.0, surrogate), compress.TransformedL1(10.0)]
    running = Running(methods, model, Setting(ModelSpec("unknown"), torch.zeros(1, 6), (), 50))
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    before, size = log_condition(model[1].weight), model[1].weight.abs().sum()
    for _ in range(50):
        optimizer.zero_grad()
        running.penalty().backward()
        optimizer.step()
    assert log_condition(model[1].weight) < before
    assert model[1].weight.abs().sum() < size
    assert model[0].weight.grad is None  # the first layer and the classifier are left alone


def test_a_singular_matrix_has_a_finite_penalty():
    weight = torch.zeros(4, 4, requires_grad=True)
    with torch.no_grad():
        weight[0, 0] = 1.0
    for surrogate in (log_condition_bound, log_am_gm, log_condition):
        value = surrogate(weight)
        (gradient,) = torch.autograd.grad(value, weight)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("surrogate", ["gej", "am_gm", "exact"])
def test_a_layer_whose_weights_are_all_masked_has_no_penalty(surrogate):
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)]
    model, images = nn.Sequential(*layers), torch.randn(64, 16)
    layers[1].weight.data.mul_(0.05)
    condition = compress.ConditionNumber(surrogate=surrogate)
    pruning = compress.GradualMagnitude(sparsity=0.9, every=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    session = compress.Session(model, [condition, pruning], images[:2], steps=12)
    session.attach(optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        (model(images).square().mean() + session.penalty()).backward()
        optimizer.step()
    assert not layers[1].weight.any()
    assert layers[2].weight.any()
    for parameter in model.parameters():
        assert parameter.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress.TransformedL1(a=0.0), "a above 0"),
        (lambda: compress.ConditionNumber(surrogate="svd"), "one of"),
        (lambda: compress.ConditionNumber(-1.0), "at least 0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
