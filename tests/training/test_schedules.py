"""Learning rates of every shape, step by step, against their definitions."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry.errors import UsageError
from smallfry.training.config import EMAConfig, ScheduleConfig
from smallfry.training.optimization import average_decay, learning_rate

PEAK, STEPS, EPOCHS = 0.5, 10, 8


def rates(config, epochs=EPOCHS):
    return [learning_rate(config, PEAK, s, STEPS, epochs) for s in range(STEPS * epochs)]


def test_a_triangle_rises_to_the_peak_and_falls_to_the_minimum():
    found = rates(ScheduleConfig(2.0, 0.1, shape="linear"))
    assert found[:19] == pytest.approx([PEAK * (s + 1) / 20 for s in range(19)])
    assert found[19] == pytest.approx(PEAK)
    falls = [before - after for before, after in pairwise(found[19:])]
    assert falls == pytest.approx([(PEAK - 0.1) / 60] * len(falls))
    assert found[-1] == pytest.approx(0.1)


def test_steps_divide_by_ten_after_each_milestone():
    config = ScheduleConfig(0.0, 0.0, shape="steps", milestones=[3, 6.5])
    found = rates(config)
    assert found[:29] == pytest.approx([PEAK] * 29)
    assert found[30:65] == pytest.approx([PEAK / 10] * 35)
    assert found[65:] == pytest.approx([PEAK / 100] * 15)


def test_steps_never_fall_below_the_minimum():
    config = ScheduleConfig(0.0, 0.02, shape="steps", milestones=[1, 2, 3])
    assert min(rates(config)) == 0.02


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_a_run_without_a_warm_up_begins_near_its_peak(shape):
    found = rates(ScheduleConfig(0.0, 0.0, shape=shape))
    assert found[0] == pytest.approx(PEAK, rel=0.02)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0.0, abs=1e-9)


@given(st.sampled_from(["cosine", "linear"]), st.floats(0, 8), st.floats(0, 1), st.integers(1, 6))
def test_rates_lie_between_the_minimum_and_the_peak(shape, warmup, minimum, epochs):
    found = rates(ScheduleConfig(warmup, minimum, shape=shape), epochs)
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in found)
    after = found[math.ceil(warmup * STEPS) :]
    assert all(rate >= min(minimum, PEAK) - 1e-15 for rate in after)  # of rounding


def test_a_rate_per_epoch_is_the_same_throughout_it():
    found = rates(ScheduleConfig(2.0, 0.0, per="epoch"))
    for epoch in range(EPOCHS):
        assert len({*found[epoch * STEPS : (epoch + 1) * STEPS]}) == 1
    assert found[0] == 0.0
    assert found[STEPS] == PEAK / 2
    assert found[2 * STEPS] == PEAK


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "steps"}, "schedule.shape steps and schedule.milestones go together"),
        ({"milestones": [3]}, "schedule.shape steps and schedule.milestones go together"),
        ({"shape": "steps", "milestones": [0, 3]}, "schedule.milestones must be positive"),
        ({"warmup_epochs": -1.0}, "schedule.warmup_epochs can't be negative"),
        ({"min_lr": -0.1}, "schedule.min_lr can't be negative"),
        ({"shape": "square"}, "schedule.shape must be one of cosine, linear, steps"),
    ],
)
def test_schedules_that_can_not_be_are_refused(settings, message):
    with pytest.raises(UsageError) as error:
        ScheduleConfig(**settings)
    assert str(error.value).startswith(message)


@given(st.floats(0, 0.9999), st.integers(0, 10**6))
def test_an_average_keeps_less_at_first_and_never_more_than_its_decay(decay, step):
    kept = average_decay(EMAConfig(decay), step)
    assert 0 <= kept <= decay
    assert kept == min(decay, (1 + step) / (10 + step))
    assert average_decay(EMAConfig(decay, warmup=False), step) == decay
