"""Random features against expectations in closed form, exact functions and given values."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from smallfry import cost
from smallfry.layers.random_features import (
    SNNKLinear,
    bundle,
    exponential_features,
    gaussian_rows,
    relu_features,
    ridge_solution,
)

GOLDEN = json.loads(Path(__file__).with_name("snnk.json").read_text())
EXACT = {"exp": torch.exp, "sin": torch.sin, "cos": torch.cos}
DRAWS = 1000


def wave(scale, k, *shape):
    values = torch.arange(math.prod(shape)).double()
    return (scale * torch.sin(0.37 * values + 0.11 * k + 0.2)).view(shape)


def arc_cosine(x, w):
    """Expectation of ReLU(g·x) ReLU(g·w) over Gaussian g."""
    lengths = x.norm(dim=1)[:, None] * w.norm(dim=1)
    angle = (x @ w.T / lengths).clamp(-1, 1).acos()
    return lengths * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)


def test_estimates_and_expectations_are_the_given_ones():
    projection, x, w = wave(1.2, 8, 6, 3), wave(0.8, 9, 2, 3), wave(0.7, 10, 4, 3)
    relu = relu_features(x, projection) @ relu_features(w, projection).T
    exp = exponential_features(x, projection) @ exponential_features(w, projection).T
    found = {
        "relu_estimate": relu,
        "relu_expectation_over_gaussian_projections": arc_cosine(x, w),
        "exp_estimate": exp,
        "exp_exact": (x @ w.T).exp(),
    }
    for name, values in found.items():
        expected = torch.tensor(GOLDEN[name], dtype=torch.float64)
        torch.testing.assert_close(values.flatten(), expected, atol=1e-9, rtol=1e-9)


def test_rows_are_standard_normal_orthogonal_in_blocks_and_follow_from_the_seed():
    rows = gaussian_rows(40_000, 4, seed=3)
    assert torch.equal(rows, gaussian_rows(40_000, 4, seed=3))
    assert not torch.equal(rows, gaussian_rows(40_000, 4, seed=4))
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(4).double(), atol=0.03, rtol=0)
    assert rows.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # of a normal distribution
    block = rows[:4] / rows[:4].norm(dim=1, keepdim=True)
    torch.testing.assert_close(block @ block.T, torch.eye(4).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("variance", [0.0, 0.1])
@pytest.mark.parametrize("kernel", ["exp", "sin", "cos"])
def test_estimates_are_unbiased(kernel, variance):
    torch.manual_seed(0)
    dense = nn.Linear(3, 2).double()
    with torch.no_grad():
        dense.weight.mul_(0.7)
    inputs = 0.4 * torch.randn(2, 3).double()
    expected = EXACT[kernel](dense(inputs)).detach()
    settings = {"features": 2, "kernel": kernel, "variance": variance}
    found = torch.stack(
        [SNNKLinear.from_dense(dense, seed=s, **settings)(inputs).detach() for s in range(DRAWS)]
    )
    error = (found.mean(0) - expected).abs() / (found.std(0) / DRAWS**0.5)
    assert float(error.max()) < 4
    spread = float((found.std(0) / DRAWS**0.5).max())
    assert spread < 0.1  # or anything would do


def test_the_expectation_of_relu_features_is_the_arc_cosine_kernel():
    torch.manual_seed(0)
    dense, inputs = nn.Linear(3, 2).double(), torch.randn(2, 3).double()
    ones = torch.ones(2, 1).double()
    expected = arc_cosine(
        torch.cat([inputs, ones], 1), torch.cat([dense.weight, dense.bias[:, None]], 1)
    )
    found = torch.stack(
        [SNNKLinear.from_dense(dense, features=4, seed=s)(inputs) for s in range(DRAWS)]
    ).detach()
    error = (found.mean(0) - expected).abs() / (found.std(0) / DRAWS**0.5)
    assert float(error.max()) < 4
    assert float((found.mean(0) - dense(inputs).relu()).abs().max()) > 0.05  # another layer


def test_errors_fall_as_the_root_of_the_number_of_features():
    torch.manual_seed(0)
    x, w = 0.5 * torch.randn(4, 4).double(), 0.5 * torch.randn(4, 4).double()
    exact, sizes, errors = (x @ w.T).exp(), [2**k for k in range(3, 13)], []
    for m in sizes:
        squares = []
        for _ in range(200):
            projection = torch.randn(m, 4).double()
            found = exponential_features(x, projection) @ exponential_features(w, projection).T
            squares.append((found - exact).square().mean())
        errors.append(torch.stack(squares).mean().sqrt().log())
    logs = torch.tensor(sizes).double().log()
    centred = logs - logs.mean()
    slope = float((centred * torch.stack(errors)).sum() / centred.square().sum())
    assert slope == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize("kernel", ["relu", "exp", "sin", "cos"])
def test_tokens_are_mapped_as_rows_and_gradients_are_exact(kernel):
    torch.manual_seed(0)
    layer = SNNKLinear.from_dense(nn.Linear(3, 4).double(), features=5, kernel=kernel)
    tokens = 0.3 * torch.randn(2, 3, 3).double()
    torch.testing.assert_close(layer(tokens).flatten(0, 1), layer(tokens.flatten(0, 1)))
    assert torch.autograd.gradcheck(layer, tokens.requires_grad_())


def test_the_linear_layer_after_the_features_is_bundled_exactly():
    torch.manual_seed(0)
    for after in (nn.Linear(6, 3).double(), nn.Linear(6, 3, bias=False).double()):
        layer = SNNKLinear.from_dense(nn.Linear(4, 6).double(), features=8, seed=5)
        one, inputs = bundle(layer, after), torch.randn(7, 4).double()
        torch.testing.assert_close(one(inputs), after(layer(inputs)), atol=1e-12, rtol=0)
        assert sum(p.numel() for p in one.parameters()) == 8 * 3 + 3


def test_the_closed_form_of_a_bundled_net_is_least_squares():
    torch.manual_seed(0)
    layer = SNNKLinear(4, 2, features=10).double()
    rows, targets = torch.randn(100, 4).double(), torch.randn(100, 2).double()
    phi = layer.features(rows)
    expected = torch.linalg.lstsq(phi, targets).solution
    found = ridge_solution(phi.T @ phi, phi.T @ targets, ridge=1e-14)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
    smaller = ridge_solution(phi.T @ phi, phi.T @ targets, ridge=0.1)
    assert float(smaller.norm()) < float(expected.norm())


def test_the_projection_is_in_no_checkpoint_and_follows_from_the_seed():
    layer = SNNKLinear(4, 2, features=10, seed=7)
    assert list(layer.state_dict()) == ["psi.weight"]
    same = SNNKLinear(4, 2, features=10, seed=7)
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same(torch.ones(1, 4)), layer(torch.ones(1, 4)))
    assert layer.double().projection.dtype == torch.float64


def test_macs_are_those_of_both_products():
    assert cost(SNNKLinear(30, 20, features=8), torch.zeros(1, 30)).macs == 30 * 8 + 8 * 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "need features"),
        ({"features": 4, "rank": 2}, "may have kernel"),
        ({"features": 0}, "features is a number"),
        ({"features": 4, "kernel": "gelu"}, "kernel is one of"),
        ({"features": 4, "seed": -1}, "seed is"),
        ({"features": 4, "variance": -1.0}, "variance is"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SNNKLinear.from_dense(nn.Linear(4, 4), **settings)
