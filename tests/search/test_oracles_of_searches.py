"""Parts of searches against brute force and other libraries: fronts, processes, ranks, novelty."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.search import Choice, Sample, fit_scaling_rule, giant_rule
from smallfry.search.gaussian_process import GaussianProcess, fit_gaussian_process, minimize
from smallfry.search.nars import (
    candidate_pool,
    costed,
    most_promising,
    round_sizes,
    shortest_proxy,
    spread_out,
)
from smallfry.search.neuroevolution.network import forward, parameters_of
from smallfry.search.neuroevolution.novelty import novelties
from smallfry.search.predictor import Prediction, Predictor, features, kendall_tau
from smallfry.search.scaling_rule import pareto_front, solve_remainder

# Fronts

POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=14)


def is_dominated(one, others):
    """As accurate for less cost, or more accurate for no more."""
    return any(
        (b.accuracy >= one.accuracy and b.macs < one.macs)
        or (b.accuracy > one.accuracy and b.macs <= one.macs)
        for b in others
    )


def peeled(samples, least):
    left, kept = list(samples), []
    while left and len(kept) < least:
        front = [each for each in left if not is_dominated(each, left)]
        left = [each for each in left if is_dominated(each, left)]
        kept += front
    return kept


@given(POINTS, st.integers(0, 16))
def test_fronts_are_what_no_other_sample_dominates_equal_ones_together(points, least):
    samples = [Sample({"width": n}, float(m), float(a)) for n, (m, a) in enumerate(points)]
    found = pareto_front(samples, least)
    assert {id(each) for each in found} == {id(each) for each in peeled(samples, least)}
    assert len(found) >= min(least, len(samples))
    costs = [each.macs for each in found]
    assert costs == sorted(costs)


def test_a_sample_that_is_given_several_times_counts_as_often():
    sample = Sample({"depth": 1, "width": 1}, 1e6, 0.5)
    assert pareto_front([sample] * 7, 5) == (sample,) * 7
    rule = fit_scaling_rule([sample] * 7, axes=("depth",))
    assert rule(1e6).settings["depth"] == pytest.approx(1)


def samples_of(count=12):
    return [Sample({"depth": c, "width": 2 * c}, 1e6 * c, c) for c in range(1, count + 1)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("accuracy", math.nan, "finite accuracies: leave out networks that diverged"),
        ("accuracy", -math.inf, "finite accuracies"),
        ("macs", math.nan, "positive macs, and finite"),
        ("macs", math.inf, "positive macs, and finite"),
        ("macs", -1.0, "positive macs"),
    ],
)
@pytest.mark.parametrize("count", [1, 8])
def test_samples_of_networks_that_diverged_are_refused(field, value, message, count):
    wrong = [each._replace(**{field: value}) for each in samples_of()[:count]]
    with pytest.raises(UsageError, match=message):
        fit_scaling_rule([*wrong, *samples_of()[count:]], axes=("depth",))


@pytest.mark.parametrize("budget", [0.0, -3e6, math.nan])
def test_a_budget_that_is_no_cost_is_refused(budget):
    rule = fit_scaling_rule(samples_of(), axes=("depth",))
    with pytest.raises(UsageError, match="a budget in MACs must be positive"):
        rule(budget)
    with pytest.raises(UsageError, match="must be positive"):
        rule.build(budget, lambda found: 1e6)


def test_the_ends_of_the_samples_are_within_them():
    rule = fit_scaling_rule(samples_of(), axes=("depth",))
    low, high = rule.costs
    assert (low, high) == (rule.front[0].macs, rule.front[-1].macs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="depth")  # a prediction may lie just outside
        assert 1 <= rule(low).settings["depth"] <= rule(high).settings["depth"] <= 12
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert rule(0.5e6).settings == {"depth": 1}
    messages = [str(each.message) for each in caught if each.category is SmallfryWarning]
    assert "a budget of 0.5 MMAC is outside the sampled 1.0 to 12.0" in messages


# Remainder


@given(
    st.integers(1, 40), st.floats(0.5, 8.0), st.floats(0, 1), st.floats(0.1, 1.0), st.floats(1, 6)
)
def test_the_remainder_is_as_near_as_a_fine_grid(step, power, share, low, width):
    high = low + width

    def cost(value):  # in steps, as counts are rounded
        return 1e3 + math.floor(step * value) ** min(power, 3.0)

    budget = cost(low) + share * (cost(high) - cost(low))
    found = solve_remainder(cost, budget, low, high)
    assert low <= found <= high
    grid = min(abs(cost(value) - budget) for value in np.linspace(low, high, 4001))
    assert abs(cost(found) - budget) <= grid + 1e-9 * abs(budget)


@pytest.mark.parametrize("budget", [0.9e6, 4.1e6, math.nan])
def test_a_remainder_out_of_reach_names_what_is_within(budget):
    with pytest.raises(UsageError, match=r"out of reach: 1\.0 to 4\.0"):
        solve_remainder(lambda width: 1e6 * width, budget, 1.0, 4.0)


@given(st.floats(0.01, 100))
def test_the_giant_rule_costs_the_share(share):
    found = giant_rule(share)
    macs = found["depth"] * found["width"] ** 2 * found["resolution"] ** 2
    assert macs == pytest.approx(share)


# Gaussian process


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_the_process_predicts_as_that_of_scikit_learn(noise):
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    random = np.random.default_rng(0)
    x = np.sort(random.uniform(-2, 5, 15))
    y = 3 + 2 * np.sin(x) + 0.1 * random.standard_normal(15)
    scale, length = 1.3, 0.8
    rows = scale**2 * np.exp(-(np.subtract.outer(x, x) ** 2) / (2 * length**2))
    inverse = np.linalg.inv(rows + noise**2 * np.eye(15))
    mean, deviation = y.mean(), y.std()
    process = GaussianProcess(
        x, inverse @ ((y - mean) / deviation), inverse, np.log([scale, length, noise]), mean,
        deviation,
    )  # fmt: skip
    kernel = ConstantKernel(scale**2) * RBF(length)
    other = GaussianProcessRegressor(kernel, alpha=noise**2, optimizer=None)
    other.fit(x[:, None], (y - mean) / deviation)
    for point in (-3.0, -1.1, 0.0, 2.2, 9.0):
        value, spread = other.predict([[point]], return_std=True)
        assert process(point)[0] == pytest.approx(value[0] * deviation + mean, rel=1e-6)
        assert process(point)[1] == pytest.approx(spread[0] * deviation, rel=1e-4, abs=1e-6)
    free = GaussianProcessRegressor(
        ConstantKernel(1.0) * RBF(1.0) + WhiteKernel(0.1), n_restarts_optimizer=3, random_state=0
    ).fit(x[:, None], (y - mean) / deviation)
    fitted = fit_gaussian_process(x, y)
    s, ell, sigma = np.exp(fitted.hyperparameters)
    theta = np.log([s**2, ell, max(1e-8, sigma**2)])
    assert free.log_marginal_likelihood(theta) >= free.log_marginal_likelihood_value_ - 0.05


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0, 3.0], [4.0] * 3), ([2.0] * 4, [1.0, 2.0, 3.0, 4.0]), ([1.0], [5.0])]
)
def test_constant_values_and_equal_places_give_finite_predictions(x, y):
    value, deviation = fit_gaussian_process(np.array(x), np.array(y))(2.0)
    assert value == pytest.approx(np.mean(y), abs=0.2)
    assert 0 <= deviation < math.inf


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_simplex_reaches_the_least_value_within_a_region(size):
    target = np.arange(1.0, size + 1)

    def bowl(point):
        return math.inf if np.abs(point).max() > 9 else float(np.square(point - target).sum())

    assert minimize(bowl, np.zeros(size), 400) == pytest.approx(target, abs=1e-3)


# Ranks, rounds and clusters

SCORES = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=6)


@given(SCORES, st.sampled_from([0.3, 0.6, 0.9, 1.0]))
def test_the_shortest_proxy_is_the_first_moment_that_orders_as_the_last(curves, least):
    from scipy.stats import kendalltau

    taus = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for moment in range(3):
            tau = kendalltau([c[moment] for c in curves], [c[-1] for c in curves]).statistic
            taus.append(0.0 if math.isnan(tau) else tau)
            own = kendall_tau([c[moment] for c in curves], [c[-1] for c in curves])
            assert own == pytest.approx(taus[-1], abs=1e-12)
    expected = next((m for m in range(2) if taus[m] >= least - 1e-12), 2)
    assert shortest_proxy(curves, least - 1e-12) == expected


@given(st.integers(1, 400))
def test_rounds_are_never_empty_and_add_up(count):
    sizes = round_sizes(count)
    assert sum(sizes) == count
    assert min(sizes) >= 1
    assert len(sizes) <= 11
    assert max(sizes[:-1], default=0) - min(sizes[:-1], default=0) <= 1


@given(st.integers(0, 12), st.sampled_from([0.0, 0.125, 0.5, 1.0]))
def test_the_promising_are_the_best_means_and_then_the_widest_spreads(size, uncertain):
    random = np.random.default_rng(size)
    predicted = Prediction(random.permutation(12).astype(float), random.permutation(12) / 10)
    pool = [{"n": n} for n in range(12)]
    found = [each["n"] for each in most_promising(pool, predicted, size, uncertain)]
    unsure = int(size * uncertain)
    order = sorted(range(12), key=lambda n: -predicted.mean[n])
    best = order[: size - unsure]
    rest = sorted(set(range(12)) - set(best), key=lambda n: -predicted.spread[n])
    assert found == best + rest[:unsure]


def test_one_candidate_is_taken_of_each_of_well_separated_clusters():
    random = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]])
    points = np.concatenate([c + 0.1 * random.standard_normal((6, 2)) for c in centres])
    pool = [{"n": n} for n in range(24)]
    for seed in range(3):
        found = [each["n"] // 6 for each in spread_out(pool, points, 4, seed)]
        assert len(found) == 4
    assert spread_out(pool[:3], points[:3], 4, 0) == pool[:3]
    assert spread_out([], points[:0], 4, 0) == []


def test_costs_are_learned_once_for_each_architecture_without_its_recipe():
    width, heads = Choice("width", (4, 8)), Choice("heads", (1, 2), when={"width": [8]})
    pool = candidate_pool((width, heads, Choice("lr", (0.1, 0.2))), 0)
    assert len(pool) == 6
    asked = []

    def costs(architecture):
        asked.append(dict(architecture))
        return [architecture["width"], 7.0]

    encodings, values = costed(pool, (width, heads), costs)
    assert asked == [{"width": 4}, {"width": 8, "heads": 1}, {"width": 8, "heads": 2}]
    assert np.array_equal(encodings, features((width, heads), asked))
    assert values.tolist() == [[4, 7], [8, 7], [8, 7]]
    assert costed(pool, (), costs) is costed(pool, (width,), None) is None


def test_a_predictor_without_a_recipe_or_an_architecture_learns_the_other():
    random = np.random.default_rng(0)
    rows, nothing = random.random((30, 2)), np.zeros((30, 0))
    scores = 5 * rows[:, 0] - rows[:, 1]
    for parts in ((rows, nothing), (nothing, rows)):
        predictor = Predictor(parts[0].shape[1], parts[1].shape[1], members=2)
        predictor.fit_scores(*parts, scores)
        found = predictor(*parts)
        assert found.mean.shape == found.spread.shape == (30,)
        assert kendall_tau(found.mean, scores) > 0.8


# Networks side by side, and novelty


@pytest.mark.parametrize("sizes", [(3, 2), (4, 5, 1), (2, 3, 4, 2)])
def test_flat_weights_are_the_layers_of_a_perceptron_of_pytorch(sizes):
    random = np.random.default_rng(0)
    weights = random.standard_normal((3, parameters_of(sizes))).astype(np.float32)
    inputs = random.standard_normal((3, 6, sizes[0])).astype(np.float32)
    found = forward(sizes, weights, inputs)
    assert found.shape == (3, 6, sizes[-1])
    for row, batch, expected in zip(weights, inputs, found, strict=True):
        layers, start = [], 0
        for before, after in pairwise(sizes):
            layer = nn.Linear(before, after)
            matrix = row[start : start + before * after].reshape(before, after)
            layer.weight.data = torch.from_numpy(matrix.T.copy())
            start += before * after
            layer.bias.data = torch.from_numpy(row[start : start + after].copy())
            start += after
            layers += [layer, nn.Tanh()]
        with torch.no_grad():
            given = nn.Sequential(*layers[:-1])(torch.from_numpy(batch))
        np.testing.assert_allclose(expected, given.numpy(), rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 12), st.integers(0, 99))
def test_novelty_is_the_mean_distance_to_the_nearest_by_brute_force(count, old, nearest, seed):
    random = np.random.default_rng(seed)
    behaviours, archive = random.standard_normal((count, 2)), random.standard_normal((old, 2))
    if count > 1:
        behaviours[1] = behaviours[0]  # an equal other is near, not the same
    expected = []
    for row in range(count):
        others = [b for n, b in enumerate(behaviours) if n != row] + list(archive)
        near = sorted(float(np.linalg.norm(behaviours[row] - b)) for b in others)[:nearest]
        expected.append(np.mean(near) if near else 0.0)
    np.testing.assert_allclose(novelties(behaviours, archive, nearest), expected, atol=1e-12)
