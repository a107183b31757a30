"""Logarithmic axes: between four and a dozen round ticks, whatever the limits."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from smallfry.report.axes import log_axis, log_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1, 1000, [1, 10, 100, 1000]),
        (0.5, 2e4, [1, 10, 100, 1000, 10_000]),
        (1, 100, [1, 3, 10, 30, 100]),
        (1, 20, [1, 2, 5, 10, 20]),
        (2, 9, [2, 3, 5, 7]),
        (1, 1e16, [1, 1e3, 1e6, 1e9, 1e12, 1e15]),
        (1e-3, 1e-1, [0.001, 0.003, 0.01, 0.03, 0.1]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_between_close_limits_ticks_are_even():
    ticks = log_ticks(0.5, 0.56)
    assert len(ticks) >= 4
    steps = {round(after - before, 9) for before, after in pairwise(ticks)}
    assert len(steps) == 1


@given(st.floats(1e-12, 1e12), st.floats(1.05, 1e12))
def test_ticks_are_few_rising_and_between_the_limits(low, factor):
    high = low * factor
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted({*ticks})
    assert low <= ticks[0]
    assert ticks[-1] <= high


@pytest.mark.parametrize("which", ["x", "y"])
def test_an_axis_gets_limits_ticks_and_plain_numbers(which):
    axes = Figure().subplots()
    log_axis(axes, which, 0.5, 2000.0)
    axis = axes.xaxis if which == "x" else axes.yaxis
    assert getattr(axes, f"get_{which}scale")() == "log"
    assert getattr(axes, f"get_{which}lim")() == pytest.approx((0.5, 2000.0))
    assert list(axis.get_majorticklocs()) == [1, 10, 100, 1000]
    formatter = axis.get_major_formatter()
    assert [formatter(value, 0) for value in (0.5, 1, 1000, 1e-5)] == ["0.5", "1", "1000", "1e-05"]
    assert list(axis.get_minorticklocs()) == []
    other = axes.yaxis if which == "x" else axes.xaxis
    assert other.get_scale() == "linear"


def test_ticks_of_one_decade_are_logarithmically_spread():
    ticks = log_ticks(1, 10)
    ratios = [math.log(after / before) for before, after in pairwise(ticks)]
    assert max(ratios) / min(ratios) < 2.1
