"""Early exit against a loop over images and steps, for any probabilities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry_runtime.early_exit import (
    NEVER,
    Point,
    Trace,
    most_accurate,
    most_thrifty,
    operating_points,
    pareto_front,
    require_threshold,
)
from smallfry_runtime.errors import UsageError

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 30), st.integers(0, 10**6))
POINTS = st.lists(
    st.builds(Point, st.just(0.5), st.integers(0, 10).map(lambda n: n / 10), st.floats(1, 5)),
    min_size=1,
    max_size=12,
)


def trace(steps, images, seed):
    random = np.random.default_rng(seed)
    halting = random.integers(0, 9, (steps, images)).astype(np.float32) / 8  # with ties
    return Trace(random.random((steps, images)) < 0.6, halting)


def by_loop(traced, threshold):
    """Each image on its own: it leaves with the first step that reaches the threshold."""
    steps, images = traced.right.shape
    right = taken = 0
    for image in range(images):
        step = 0
        while step < steps - 1 and traced.halting[step, image] < threshold:
            step += 1
        right += traced.right[step, image]
        taken += step + 1
    return right / images, taken / images


@given(SIZES)
def test_accuracy_and_steps_are_those_of_a_loop(sizes):
    traced = trace(*sizes)
    for point in operating_points(traced):
        accuracy, steps = by_loop(traced, point.threshold)
        assert point.accuracy == pytest.approx(accuracy)
        assert point.steps == pytest.approx(steps)


@given(SIZES)
def test_a_higher_threshold_takes_no_fewer_steps(sizes):
    points = operating_points(trace(*sizes))
    thresholds, steps = [p.threshold for p in points], [p.steps for p in points]
    assert thresholds == sorted({*thresholds})
    assert steps == sorted(steps)
    assert (thresholds[0], thresholds[-1]) == (0.0, NEVER)
    assert steps[0] == 1
    assert steps[-1] == sizes[0]


@given(SIZES)
def test_every_behaviour_of_few_images_is_among_the_points(sizes):
    """All thresholds that make a difference are measured."""
    traced = trace(*sizes)
    found = {(p.accuracy, p.steps) for p in operating_points(traced)}
    for threshold in {*traced.halting[:-1].ravel().tolist(), 0.0, NEVER}:
        accuracy, steps = by_loop(traced, threshold)
        assert any(np.allclose((accuracy, steps), each) for each in found)


def test_the_caller_keeps_its_trace():
    traced = trace(3, 20, 0)
    before = traced.halting.copy(), traced.right.copy()
    operating_points(traced)
    assert np.array_equal(traced.halting, before[0])
    assert np.array_equal(traced.right, before[1])


@given(POINTS, st.floats(0, 1))
def test_the_thriftiest_point_loses_no_more_than_allowed(points, drop):
    chosen = most_thrifty(points, drop)
    assert chosen.accuracy >= points[-1].accuracy - drop - 1e-8
    allowed = [p for p in points if p.accuracy >= points[-1].accuracy - drop]
    assert chosen.steps <= min(p.steps for p in allowed)


@given(POINTS, st.floats(1, 6))
def test_the_most_accurate_point_keeps_the_budget(points, budget):
    affordable = [p for p in points if p.steps <= budget]
    if not affordable:
        return
    chosen = most_accurate(points, budget)
    assert chosen.steps <= budget + 1e-8
    assert chosen.accuracy >= max(p.accuracy for p in affordable)


def test_a_budget_below_the_cheapest_point_is_refused():
    with pytest.raises(UsageError, match=r"exit_steps must be at least 1, not 0.5"):
        most_accurate([Point(0.0, 1.0, 1.0)], 0.5)


@given(POINTS)
def test_no_point_of_the_front_is_beaten_by_another(points):
    front = pareto_front(points)
    assert front[-1] == points[-1]
    for point in front[:-1]:
        assert point in points
        for other in points[:-1]:
            better = other.accuracy > point.accuracy and other.steps <= point.steps
            cheaper = other.accuracy >= point.accuracy and other.steps < point.steps
            assert not better
            assert not cheaper


@pytest.mark.parametrize("threshold", [0, 0.0, 0.5, 1, 1.01, float("inf")])
def test_thresholds_are_probabilities_or_above(threshold):
    assert require_threshold(threshold) == threshold


@pytest.mark.parametrize("threshold", [-0.1, -1, float("nan"), float("-inf")])
def test_other_thresholds_are_refused(threshold):
    with pytest.raises(UsageError, match="exit_threshold must be a halting probability from 0"):
        require_threshold(threshold)
