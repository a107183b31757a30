"""Settings, budgets and plans of a fit: what is decided is a function of stored numbers."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry.errors import RunError, UsageError
from smallfry.fitting.config import Budget, FitConfig
from smallfry.fitting.costs import Costs
from smallfry.fitting.plan import (
    FEWEST,
    MOST,
    Plan,
    Planned,
    Spent,
    affordable,
    first_count,
    read_plan,
    rung_counts,
    shares,
    training_seconds,
)
from smallfry.fitting.zoo import Entry
from smallfry.training.config import DataConfig


def planned(name="loopnet_70k", epoch=1.0, kb=80.0, ms=0.3, parameters=70_000):
    costs = Costs(
        parameters, 12_000_000, {"float32": 4 * kb, "int8": kb}, {"float32": 2 * ms, "int8": ms}
    )
    return Planned(Entry(name, name, 1.0, "loopnet", {}), costs, epoch)


def plan_of(*candidates, seconds=100.0, counts=None):
    counts = counts or rung_counts(len(candidates))
    return Plan(tuple(candidates), counts, seconds, 20.0, 1, "abc", {"other": "too large"})


# Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_kb": -1.0}, "max_kb must be more than 0"),
        ({"max_ms": 0.0}, "max_ms must be more than 0"),
        ({"max_ms": math.inf}, "max_ms must be more than 0 and finite"),
        ({"max_kb": math.nan}, "max_kb must be more than 0"),
        ({"minutes": 0.0}, "minutes must be more than 0"),
        ({"min_accuracy": 0.0}, "min_accuracy is a percentage"),
        ({"min_accuracy": 0.9}, "above 1 and at most 100, such as 90, got 0.9"),
        ({"min_accuracy": 101.0}, "min_accuracy is a percentage"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"seed": -1}, "seed is 0"),
        ({"candidates": ()}, "candidates is empty"),
        ({"data": DataConfig(validation=0.0)}, "validation must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        FitConfig(**given)


def test_a_fit_without_any_limit_is_refused():
    with pytest.raises(UsageError, match="--max_kb, --max_ms or both"):
        FitConfig().require_budget()
    FitConfig(max_ms=2).require_budget()
    FitConfig(max_kb=20).require_budget()


def test_settings_are_compared_as_plain_data_but_for_the_place_of_the_data(tmp_path):
    config = FitConfig(DataConfig("photos", root=tmp_path), max_kb=20, pretrained=(tmp_path,))
    content = config.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["data.name"] == "photos"
    assert "data.root" not in content
    assert content["pretrained"] == [str(tmp_path)]


# Budgets


def test_a_budget_is_met_if_both_limits_are_and_a_missing_one_always_is():
    assert Budget(20, 2).fits(20, 2)
    assert not Budget(20, 2).fits(20.1, 2)
    assert not Budget(20, 2).fits(20, 2.1)
    assert Budget(None, 2).fits(1e9, 2)
    assert Budget(20, None).fits(20, 1e9)
    assert Budget(20, 2).excess(30, 8) == 4
    assert str(Budget(20, 2)) == "20 kB and 2 ms"
    assert (str(Budget(20.5, None)), str(Budget(None, 0.5))) == ("20.5 kB", "0.5 ms")


# Rungs


@given(st.integers(1, 30))
def test_rungs_fall_to_one_candidate_and_their_shares_are_everything(count):
    counts = rung_counts(count)
    assert counts[0] == count
    assert counts[-1] == 1
    assert list(counts) == sorted(counts, reverse=True)
    assert sum(shares(len(counts))) == pytest.approx(1)


@pytest.mark.parametrize(("minutes", "count"), [(0.1, FEWEST), (16, 5), (60, MOST)])
def test_longer_fits_try_more_candidates(minutes, count):
    assert first_count(minutes) == count


def test_epochs_use_the_seconds_of_the_rungs_and_rise_in_each():
    plan = plan_of(*(planned(str(i), epoch=1.0) for i in range(4)), seconds=100)
    # shares 0.3, 0.3, 0.4 of 100 seconds for 4, 2 and 1 candidates
    assert [plan.epochs("0", rung) for rung in range(3)] == [8, 23, 63]
    slow = plan_of(*(planned(str(i), epoch=1e6) for i in range(4)))
    assert [slow.epochs("0", rung) for rung in range(3)] == [1, 2, 3]


def test_planning_and_exports_leave_at_least_half_of_the_minutes_to_training():
    assert training_seconds(Spent(3600, 60), runs=10) == 3600 - 60 - 40 - 25
    assert training_seconds(Spent(60, 50), runs=10) == 30


def test_candidates_without_time_for_an_epoch_are_left_out_by_name():
    quick, slow = planned("quick", epoch=10), planned("slow", epoch=100)
    kept, reasons = affordable([quick, slow], (2, 1), seconds=60, minutes=1)
    assert [each.name for each in kept] == ["quick"]
    assert reasons == {"slow": "an epoch takes 1:40, the first rung 0:13"}


def test_too_few_minutes_for_any_epoch_are_refused_with_those_that_are_needed():
    with pytest.raises(UsageError, match=r"1 minutes are too few .* slow, needs about 3\.9"):
        affordable([planned("slow", epoch=100)], (2, 1), seconds=60, minutes=1)


# File


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan, file = plan_of(planned(), planned("cct", epoch=2.5)), tmp_path / "plan.json"
    assert read_plan(file) is None
    plan.write(file)
    assert read_plan(file) == plan


@pytest.mark.parametrize("text", ["{", "[]", '{"candidates": [{}], "counts": []}', "{}"])
def test_a_damaged_plan_is_an_error_that_names_the_file(tmp_path, text):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(RunError, match=r"plan.json: damaged"):
        read_plan(file)
