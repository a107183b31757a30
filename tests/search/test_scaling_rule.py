"""The scaling rule on planted truths, and against the published networks."""

import math

import numpy as np
import pytest
import timm
import torch

from smallfry import cost
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.search import Sample, fit_scaling_rule, giant_rule
from smallfry.search.gaussian_process import fit_gaussian_process, minimize
from smallfry.search.scaling_rule import pareto_front, solve_remainder

BASE = 100e6


def macs(settings: dict) -> float:
    return BASE * settings["depth"] * settings["width"] ** 2 * settings["resolution"] ** 2


def planted(count: int = 400, noise: float = 0.0) -> list[Sample]:
    """Networks whose accuracy is best at r = c^0.2 and d = c^0.25 of any cost c."""
    random = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        c = math.exp(random.uniform(math.log(0.05), 0))
        r, d = c**0.2 * random.uniform(0.9, 1.1), c**0.25 * random.uniform(0.9, 1.1)
        settings = {"resolution": r, "depth": d, "width": math.sqrt(c / (d * r * r))}
        off = (math.log(r / c**0.2)) ** 2 + (math.log(d / c**0.25)) ** 2
        accuracy = 0.8 + 0.1 * math.log(c) - 3 * off + noise * random.standard_normal()
        samples.append(Sample(settings, macs(settings), accuracy))
    return samples


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_a_planted_rule_is_recovered(noise: float) -> None:
    rule = fit_scaling_rule(planted(noise=noise))
    assert len(rule.front) >= 80
    for c in (0.1, 0.2, 0.4, 0.7):
        found = rule(c * BASE)
        assert found.settings["resolution"] == pytest.approx(c**0.2, rel=0.05)
        assert found.settings["depth"] == pytest.approx(c**0.25, rel=0.05)
        assert 0 < found.deviations["depth"] < 0.05


def test_budgets_are_met_on_measured_cost() -> None:
    rule = fit_scaling_rule(planted())

    def measured(settings: dict) -> float:  # with a stem that does not shrink
        return macs(settings) + 2e6

    for budget in (10e6, 30e6, 60e6):
        settings = rule.build(budget, measured)
        assert measured(settings) == pytest.approx(budget, rel=0.02)
        assert settings.keys() == {"resolution", "depth", "width"}
    with pytest.raises(UsageError, match=r"30\.0 MMAC is out of reach: 2"):
        rule.build(30e6, measured, within=(0.01, 0.02))


def test_other_axes_and_bounds() -> None:
    samples = [Sample({"recursion": 1 + c, "width": c}, 1e6 * c, c) for c in np.linspace(1, 10, 30)]
    rule = fit_scaling_rule(samples, axes=("recursion",))
    assert rule(5e6).settings["recursion"] == pytest.approx(6, rel=0.02)
    with pytest.warns(SmallfryWarning, match="outside the sampled") as caught:
        found = rule(40e6).settings["recursion"]
    assert 2 <= found <= 11
    assert any("budget of 40.0 MMAC" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([Sample({"depth": 1, "width": 1}, 1, 1)] * 9, "a setting of 'resolution'"),
        ([Sample({"depth": 1, "width": 1, "resolution": 1}, 1, 1)] * 4, "at least 5 samples"),
        ([Sample({"depth": 1, "width": 1, "resolution": 1}, 0, 1)] * 5, "positive macs"),
    ],
)
def test_unusable_samples_are_refused(samples: list, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_scaling_rule(samples)


def test_fronts_follow_one_another() -> None:
    points = [(1, 1), (2, 3), (3, 2), (4, 5), (2, 2), (5, 4)]
    samples = [Sample({}, *point) for point in points]
    assert [s[1:] for s in pareto_front(samples, 1)] == [(1, 1), (2, 3), (4, 5)]
    assert [s[1:] for s in pareto_front(samples, 4)] == [
        (1, 1), (2, 3), (2, 2), (4, 5), (5, 4)
    ]  # fmt: skip
    assert len(pareto_front(samples, 99)) == 6


def test_the_process_interpolates_and_is_unsure_elsewhere() -> None:
    x = np.linspace(0, 3, 12)
    process = fit_gaussian_process(x, np.sin(x))
    value, deviation = process(1.4)
    assert value == pytest.approx(math.sin(1.4), abs=1e-3)
    assert process(9.0)[1] > 10 * deviation
    constant = fit_gaussian_process(x, np.full(12, 2.0))
    assert constant(1.0)[0] == pytest.approx(2.0)


def test_the_process_is_the_posterior_of_its_hyperparameters() -> None:
    random = np.random.default_rng(1)
    x, y = np.sort(random.uniform(0, 2, 9)), random.standard_normal(9)
    process = fit_gaussian_process(x, y)
    s, length, noise = np.exp(process.hyperparameters)
    centred = (y - y.mean()) / y.std()
    gram = s**2 * np.exp(-((x[:, None] - x) ** 2) / 2 / length**2)
    row = s**2 * np.exp(-((0.7 - x) ** 2) / 2 / length**2)
    covariance = gram + max(noise, 1e-4) ** 2 * np.eye(9)
    value = row @ np.linalg.solve(covariance, centred) * y.std() + y.mean()
    spread = (s**2 - row @ np.linalg.solve(covariance, row)) ** 0.5 * y.std()
    assert process(0.7) == pytest.approx((value, spread), rel=1e-6)


def test_the_simplex_finds_a_minimum() -> None:
    found = minimize(lambda p: float(100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2), np.zeros(2))
    assert found.tolist() == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (336.9 / 385.8, (0.97, 0.96, 0.98)),
        (200.7 / 385.8, (0.87, 0.83, 0.91)),
        (99.5 / 385.8, (0.75, 0.69, 0.82)),
        (51.6 / 385.8, (0.65, 0.57, 0.75)),
        (24.4 / 385.8, (0.55, 0.46, 0.67)),
    ],
)
def test_the_giant_rule_of_the_papers_budgets(share: float, wanted: tuple) -> None:
    rule = giant_rule(share)
    found = (rule["resolution"], rule["depth"], rule["width"])
    assert found == pytest.approx(wanted, abs=0.006)
    with pytest.raises(UsageError, match="must be positive"):
        giant_rule(0)


def test_steps_of_the_cost_are_met_as_well_as_can_be() -> None:
    assert solve_remainder(lambda w: 8 * round(w / 8) * 1e6, 41e6, 8, 80) == pytest.approx(
        40, abs=4
    )


@pytest.mark.slow
def test_widths_of_a_real_network_meet_budgets() -> None:
    def measured(width: float) -> float:
        with torch.device("meta"):
            model = timm.create_model("simplenet_cifar_310k", width=width)
            return cost(model, torch.zeros(1, 3, 32, 32)).macs

    found = solve_remainder(measured, 20e6, 0.4, 1.0, steps=8)
    assert measured(found) == pytest.approx(20e6, rel=0.02)
