from itertools import pairwise

import numpy as np
import pytest

from smallfry.errors import SmallfryWarning, UsageError
from smallfry_runtime.early_exit import (
    Trace,
    most_accurate,
    most_thrifty,
    operating_points,
    pareto_front,
    require_threshold,
    warn_of_few,
)

# three steps, four images: one is sure and right at once, one late, one is right only at first
TRACED = Trace(
    right=np.array([[1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool),
    halting=np.array(
        [[0.9, 0.2, 0.6, 0.1], [0.9, 0.7, 0.5, 0.1], [0.9, 0.9, 0.4, 0.1]], np.float32
    ),
)


def test_points_go_from_one_step_for_all_to_all_steps():
    points = operating_points(TRACED)
    assert (points[0].accuracy, points[0].steps) == (0.5, 1.0)
    assert (points[-1].accuracy, points[-1].steps) == (0.5, 3.0)
    assert [p.steps for p in points] == sorted(p.steps for p in points)


def test_the_chosen_point_keeps_accuracy_or_cost():
    points = operating_points(TRACED)
    best = most_accurate(points, steps=2.0)
    assert best.accuracy == 0.75  # the second image waits, the third does not
    assert best.steps <= 2.0
    assert most_thrifty(points, drop=0.0).steps == 1.0
    with pytest.raises(UsageError, match="exit_steps must be at least 1"):
        most_accurate(points, steps=0.5)


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), 5.0, float("inf")])
def test_a_drop_is_a_share_of_accuracy(wrong):
    with pytest.raises(UsageError, match="a share of accuracy from 0 to 1"):
        most_thrifty(operating_points(TRACED), wrong)


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("-inf")])
def test_budgets_and_thresholds_that_are_none_are_refused(wrong):
    with pytest.raises(UsageError, match="exit_steps must be at least 1"):
        most_accurate(operating_points(TRACED), wrong)
    with pytest.raises(UsageError, match="a halting probability"):
        require_threshold(wrong)
    assert require_threshold(1.5) == 1.5


def test_worthwhile_points_are_beaten_by_none_in_both_accuracy_and_steps():
    points = operating_points(TRACED)
    kept = pareto_front(points)
    assert kept[-1] == points[-1]  # all steps, whatever they are worth
    for point in points:
        assert any(k.accuracy >= point.accuracy and k.steps <= point.steps for k in kept)
    for before, after in pairwise(kept[:-1]):
        assert before.steps < after.steps
        assert before.accuracy < after.accuracy


@pytest.mark.parametrize("images", [1, 4, 99])
def test_thresholds_of_few_images_are_told(images):
    with pytest.warns(SmallfryWarning, match=f"measured on only {images} validation images"):
        warn_of_few(images)


def test_thresholds_of_enough_images_are_not_told():
    warn_of_few(100)  # a warning is a failure
