import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry.deploy.latency import take_turns
from smallfry.errors import UsageError


class Clock:
    """Seconds that pass only where somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def worker(self, durations, log=None, name=""):
        left = iter(durations)

        def work():
            self.now += next(left)
            if log is not None:
                log.append(name)

        return work


def test_the_faster_one_is_faster():
    clock = Clock()
    calls = {
        "slow": clock.worker(itertools.repeat(0.004)),
        "fast": clock.worker(itertools.repeat(0.001)),
    }
    found = take_turns(calls, seconds=0.05, rounds=5, clock=clock)
    assert found["fast"].p50 == pytest.approx(1)
    assert found["slow"].p50 == pytest.approx(4)
    assert found["fast"].calls > found["slow"].calls


def test_by_default_the_clock_is_that_on_the_wall():
    asleep = take_turns({"one": lambda: time.sleep(0.004)}, seconds=0, rounds=2)["one"]
    assert asleep.low >= 4  # and above it as much as the machine is busy


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30))
def test_percentiles_are_those_of_the_counted_calls(durations):
    clock = Clock()
    calls = {"one": clock.worker(durations)}
    found = take_turns(calls, 0, len(durations), warm_up=0, settling=0, clock=clock)["one"]
    wanted = 1000 * np.percentile(durations, [25, 50, 75, 95])
    np.testing.assert_allclose([found.low, found.p50, found.high, found.p95], wanted, rtol=1e-6)
    assert found.mean == pytest.approx(1000 * np.mean(durations))
    assert found.calls == len(durations)


def test_turns_are_taken_in_rounds():
    clock, log = Clock(), []
    calls = {name: clock.worker([1.0] * 99, log, name) for name in "ab"}
    take_turns(calls, seconds=6, rounds=3, warm_up=1, settling=0, clock=clock)
    assert "".join(log) == "ab" + 3 * "aabb"


def test_warming_up_and_settling_are_not_counted():
    clock = Clock()
    durations = [50.0, 50.0, *[20.0, 1.0, 1.0] * 2]  # two to warm up, then one at each turn
    found = take_turns({"one": clock.worker(durations)}, 4, 2, 2, 1, clock)["one"]
    assert (found.calls, found.mean) == (4, 1000)


def test_a_call_that_fills_a_turn_needs_no_settling():
    clock, log = Clock(), []
    take_turns({"a": clock.worker([3.0] * 99, log, "a")}, 4, 2, 0, 1, clock)
    assert len(log) == 3  # settled once, at first


def test_a_machine_that_slows_down_slows_all():
    clock = Clock()
    first, second = ([1.0 + 0.1 * i for i in range(40)] for _ in range(2))
    calls = {"first": clock.worker(first), "second": clock.worker(second)}
    found = take_turns(calls, 0, 40, 0, 0, clock)
    assert found["first"] == pytest.approx(found["second"])


def test_one_call_at_least_in_every_round():
    clock = Clock()
    assert take_turns({"one": clock.worker([9.0] * 9)}, 0.1, 4, 0, 1, clock)["one"].calls == 4


@pytest.mark.parametrize(("seconds", "rounds"), [(1, 0), (-1, 3)])
def test_impossible_times_are_refused(seconds, rounds):
    with pytest.raises(UsageError, match="at least one round"):
        take_turns({}, seconds, rounds)
