"""Dual functions agree with quadrature, and depth makes the classifiers of the theorem."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from smallfry.errors import UsageError
from smallfry.layers.hermite import (
    Hermite,
    deep_kernel,
    dual,
    find_limit,
    hermite_coefficients,
    optimal_coefficients,
    relu_dual,
)

GOLDEN = json.loads((Path(__file__).parent / "hermite.json").read_text())
TEST = 150


@pytest.mark.parametrize("dimension", [*map(int, GOLDEN["optimal_hermite"])])
def test_optimal_activations_have_the_dimension_as_their_exponent(dimension):
    known, found = GOLDEN["optimal_hermite"][str(dimension)], optimal_coefficients(dimension)
    for k, value in known["coefficients"].items():
        assert found[int(k)] == pytest.approx(value, abs=1e-12)
    assert float(found @ found) == pytest.approx(1, abs=1e-12)
    function = dual(found)
    ends = [float(each(np.array(at))) for each, at in zip(function, (0.3, 1.0), strict=True)]
    assert ends == pytest.approx([known["dual_at_0_3"], known["slope1"]], abs=1e-12)
    limit = find_limit(found[0] ** 2, found[1] ** 2, ends[1])
    assert limit.kind == "singular kernel"
    assert limit.exponent == pytest.approx(dimension, abs=1e-10)


@pytest.mark.parametrize("dimension", [1, 2, 3, 10])
def test_series_of_the_dual_equals_quadrature(dimension):
    found = optimal_coefficients(dimension)
    activation = Hermite(found.tolist())
    again = hermite_coefficients(activation, 8)
    np.testing.assert_allclose(again, np.pad(found, (0, 8 - len(found))), atol=1e-12)
    # E σ(u)σ(v) over a grid of Gauss–Hermite nodes, exact for polynomials
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    weights = weights / math.sqrt(2 * math.pi)
    u = torch.from_numpy(nodes)
    v = 0.3 * u[:, None] + math.sqrt(1 - 0.09) * u
    mean = float((weights * activation(u).numpy()) @ activation(v).numpy() @ weights)
    assert float(dual(found).value(np.array(0.3))) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("depth", [*map(int, GOLDEN["deep_ntk_d3"])])
def test_deep_kernels_are_those_of_an_independent_computation(depth):
    known = GOLDEN["deep_ntk_d3"][str(depth)]
    function = dual(optimal_coefficients(3))
    found = deep_kernel(np.array([float(xi) for xi in known]), function, depth)
    own = sum(2.0**k for k in range(depth + 1))
    np.testing.assert_allclose(found * own, list(known.values()), rtol=1e-11)


def test_the_dual_of_relu_equals_its_series_away_from_one():
    series = dual(hermite_coefficients(torch.relu, 60))
    xi = np.linspace(-0.8, 0.8, 9)
    np.testing.assert_allclose(relu_dual().value(xi), series.value(xi), atol=1e-9)
    np.testing.assert_allclose(relu_dual().slope(xi), series.slope(xi), atol=1e-7)


def votes(function, depth, dimension, labels):
    """Decide test points on the positive orthant, and return distances to training points."""
    draw = np.random.default_rng(0)
    points = np.abs(draw.normal(size=(200 + TEST, dimension + 1)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    train, test = points[:200], points[200:]
    y = labels(train, draw)
    kernel = deep_kernel(train @ train.T, function, depth)
    np.fill_diagonal(kernel, 1)
    decided = np.sign(np.linalg.solve(kernel, y) @ deep_kernel(train @ test.T, function, depth))
    return decided, y, np.sqrt(np.maximum(0, 2 - 2 * train @ test.T))


def halves(train, draw):
    return np.where(train[:, 0] > np.median(train[:, 0]), 1.0, -1.0)


def noise(train, draw):
    return np.where(draw.random(len(train)) < 0.7, 1.0, -1.0)


def test_optimal_activations_vote_by_inverse_powers_of_the_distance():
    for dimension in (2, 3):
        function = dual(optimal_coefficients(dimension))
        decided, y, distance = votes(function, 20, dimension, halves)
        assert (decided == np.sign(y @ distance**-dimension)).mean() >= 0.95


def test_an_activation_without_linear_part_finds_the_nearest_neighbour():
    function = dual([0, 0, 0.5**0.5, 0.5**0.5])
    assert find_limit(0, 0, 2.5).kind == "nearest neighbour"
    agreement = []
    for depth in (3, 10):
        decided, y, distance = votes(function, depth, 2, noise)
        agreement.append((decided == y[distance.argmin(0)]).mean())
    assert agreement[0] < 0.9 < 0.99 <= agreement[1]


def test_relu_becomes_a_majority_vote():
    decided, y, _ = votes(relu_dual(), 1000, 2, noise)
    assert (decided == np.sign(y.sum())).mean() >= 0.95
    assert find_limit(1 / math.pi, 0.5, 1.0).kind == "majority vote"


def test_no_depth_explodes():
    function = dual(optimal_coefficients(2))
    found = deep_kernel(np.array([-1.0, 0.2, 1.0, 1 + 1e-15]), function, 400)
    assert np.isfinite(found).all()
    assert found[2:] == pytest.approx(1)


def test_hermite_activations_are_scaled_and_differentiable():
    activation = Hermite([0, 2.0, 0, 2.0])
    z = torch.linspace(-2, 2, 7, dtype=torch.float64, requires_grad=True)
    expected = (z + (z**3 - 3 * z) / 6**0.5) / 2**0.5
    torch.testing.assert_close(activation(z), expected)
    assert torch.autograd.gradcheck(activation, z)
    with pytest.raises(UsageError, match="other than 0"):
        Hermite([0, 0])
    with pytest.raises(UsageError, match="dimension 1 or more, not 0"):
        optimal_coefficients(0)


def test_identity_has_no_known_limit():
    assert find_limit(0.0, 1.0, 1.0).kind == "unknown"
