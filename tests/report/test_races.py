"""What a race's records are summed up to; the page is checked in test_race_page."""

import math

import pytest

from smallfry.report.race_curves import at_seconds, band, run_of, time_to_reach
from smallfry.report.races import (
    choose_targets,
    common_end,
    fisher,
    select,
    summarize,
    times,
    tuning,
)


def points(*losses, every=1.0, validation=2.0):
    return [
        {
            "step": 10 * i,
            "epoch": i / 2,
            "seconds": i * every,
            "train": x,
            "validation": x * validation,
        }
        for i, x in enumerate(losses)
    ]


def record(contestant, *losses, phase="tuned", seed=0, **more):
    measured = {"points": points(*losses), "diverged": False, "steps": 100, "plain_ms": 2.0}
    measured |= {"refresh_ms": None, "mean_ms": 4.0, "state_over_weights": 1.5}
    measured |= more.pop("measured", {})
    return {
        "problem": "curves",
        "phase": phase,
        "contestant": contestant,
        "label": contestant.upper(),
        "family": "peer" if contestant == "adamw" else "ours",
        "settings": {"lr": 0.1},
        "seed": seed,
        "trial": None,
        "seconds": 2.0,
        "clock": "cpu",
        "measured": measured,
        **more,
    }


def test_a_target_between_points_is_reached_where_the_log_of_the_loss_is():
    run = points(1.0, 0.01, 0.001)
    assert time_to_reach(run, 0.1) == pytest.approx(0.5)
    assert time_to_reach(run, 0.01) == 1.0
    assert time_to_reach(run, 1.5) == 0.0
    assert time_to_reach(run, 0.0009) is None
    assert time_to_reach(run, 0.2, "validation") == pytest.approx(0.5)
    assert time_to_reach([], 0.1) is None


def test_the_first_crossing_counts_though_the_loss_rises_again():
    assert time_to_reach(points(1.0, 0.1, 5.0, 0.01), 0.1) == 1.0


def test_a_loss_of_zero_reaches_every_target():
    assert 0 < time_to_reach(points(1.0, 0.0), 0.1) < 1


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_nothing_after_a_loss_that_is_not_finite_counts(end):
    run = points(1.0, 0.5, end, 0.001)
    assert time_to_reach(run, 0.1) is None
    assert at_seconds(run, 1.0) == 0.5
    assert at_seconds(run, 2.0) is None
    assert run_of({"points": run}).diverged


def test_between_points_the_loss_is_their_geometric_mean_and_outside_unknown():
    run = points(0.3, 0.003)
    assert at_seconds(run, 0.5) == pytest.approx(0.03)
    assert at_seconds(run, 0.0) == 0.3  # to the last digit
    assert at_seconds(run, 1.01) is None
    assert at_seconds(run[1:], 0.5) is None


def test_a_band_is_the_median_and_range_and_ends_with_the_first_run():
    runs = [run_of({"points": points(*losses)}) for losses in ((1, 4, 9), (1, 2), (1, 1, 1))]
    found = band(runs, "step", "train")
    assert found.x.tolist() == [0, 10]
    assert found.median.tolist() == [1, 2]
    assert (found.low.tolist(), found.high.tolist()) == ([1, 1], [1, 4])
    assert not found.diverged


def test_a_band_goes_on_past_a_third_that_diverged_and_ends_at_half():
    good, bad = points(1, 0.5, 0.4), points(1, 2, math.nan)
    found = band([run_of({"points": p}) for p in (good, good, bad)], "seconds", "train")
    assert found.x.tolist() == [0, 1, 2]
    assert found.high.tolist() == [1, 2, 0.4]
    found = band([run_of({"points": p}) for p in (good, bad)], "seconds", "train")
    assert found.x.tolist() == [0, 1]
    assert found.diverged


def test_losses_are_compared_at_the_common_end():
    rows = summarize([record("kfac", 1, 0.1, 0.01), record("adamw", 1, 0.5)])
    assert [row.contestant for row in rows] == ["kfac", "adamw"]
    assert {row.end for row in rows} == {1.0}
    assert rows[0].train == (0.1, 0.1, 0.1)
    assert rows[0].validation.median == 0.2


def test_runs_that_diverged_or_hardly_began_do_not_set_the_common_end():
    runs = [(1, 1, 1, 1, 1), (1, 1, 1, 1), (1,)]
    runs = [run_of({"points": points(*losses)}) for losses in runs]
    bad = run_of({"points": points(1, 1), "diverged": True})
    assert common_end([*runs, bad]) == 3.0
    assert common_end([bad]) == 1.0
    assert common_end([]) == 0.0


def test_seeds_are_joined_by_their_median_with_a_diverged_one_as_infinite():
    records = [record("kfac", 1, x, seed=i) for i, x in enumerate((0.3, 0.1))]
    records.append(record("kfac", 1, seed=2, measured={"points": points(1), "diverged": True}))
    row = summarize(records)[0]
    assert row.train == (0.3, 0.1, math.inf)
    assert (row.diverged, row.seeds) == (1, 3)
    row = summarize(records[1:])[0]
    assert row.train.median == math.inf


def test_a_run_that_diverged_after_the_common_end_is_infinite_all_the_same():
    late = record("kfac", 1, 0.3, 0.2, measured={"diverged": True})
    row = summarize([record("adamw", 1, 0.5), late])[1]
    assert (row.contestant, row.end, row.train.median) == ("kfac", 1.0, math.inf)


def test_rows_carry_the_costs_and_their_ratio_to_adamw():
    slow = record("kfac", 1, 0.1, measured={"mean_ms": 12.0, "refresh_ms": 30.0, "steps": math.nan})
    kfac, adamw = summarize([record("adamw", 1, 0.5), slow])
    assert (kfac.mean_over_adamw, adamw.mean_over_adamw) == (3.0, 1.0)
    assert (kfac.refresh_ms, adamw.refresh_ms) == (30.0, None)
    assert (kfac.steps, adamw.steps) == (None, 100)
    assert summarize([slow])[0].mean_over_adamw is None


def test_problems_and_phases_stay_apart_and_other_phases_out():
    records = [
        record("kfac", 1, 0.2, phase="defaults"),
        record("kfac", 1, 0.1),
        record("kfac", 1, 0.3, problem="mnist"),
        record("kfac", 1, 0.4, phase="tuning"),
        record("kfac", phase="fisher"),
    ]
    found = [(row.problem, row.phase, row.train.median) for row in summarize(records)]
    wanted = [("curves", "tuned", 0.1), ("curves", "defaults", 0.2), ("mnist", "tuned", 0.3)]
    assert found == wanted


def test_of_a_run_made_twice_the_last_counts_but_trials_are_all_kept():
    records = [record("kfac", 1, 0.5), record("kfac", 1, 0.1)]
    assert select(records, "curves", "tuned") == records[1:]
    trials = [record("kfac", 1, phase="tuning", trial=i) for i in range(2)]
    assert select(trials, "curves", "tuning") == trials


def finals(*losses, start=1.0):
    return summarize([record(f"c{i}", start, loss) for i, loss in enumerate(losses)])


def test_targets_are_what_most_half_and_few_reached_rounded_up():
    assert choose_targets(finals(0.011, 0.0231, 0.0342, 0.2)) == [0.035, 0.024, 0.011]


def test_targets_get_the_digits_that_tell_them_apart():
    assert choose_targets(finals(0.1011, 0.1023, 0.1034, 0.2)) == [0.104, 0.103, 0.102]


def test_targets_lie_below_the_start():
    assert choose_targets(finals(0.5, 0.6, 0.693, start=0.6931)) == [0.693, 0.6, 0.5]
    assert choose_targets(finals(0.5, 1.0, 1.0)) == [0.5]
    assert choose_targets(finals(1.0, 1.0)) == []


def test_targets_are_chosen_from_what_is_there():
    assert choose_targets([]) == []
    assert choose_targets(finals(0.25)) == [0.25]
    gone = record("c9", measured={"points": [], "diverged": True})
    assert choose_targets(summarize([record("c0", 1, 0.25), gone])) == [0.25]


def test_contestants_that_all_end_equal_have_one_target():
    assert choose_targets(finals(0.25, 0.25, 0.25, 0.25)) == [0.25]


def test_times_are_medians_within_the_common_end_with_ratios():
    records = [
        record("kfac", 1, 0.1, 0.01),
        record("adamw", 1, 0.5, 0.1),
        record("adamw", 1, 0.5, 0.1, seed=1),
        record("late", 1, 0.9, 0.8, 0.001),
    ]
    rows = summarize(records)
    assert choose_targets(rows) == [0.8, 0.1, 0.01]
    found = {reach.contestant: reach for reach in times(records, rows)}
    assert list(found) == ["kfac", "adamw", "late"]
    assert found["kfac"].seconds[1:] == (1.0, 2.0)
    assert found["adamw"].seconds[1:] == (2.0, None)
    assert found["adamw"].over_kfac[1:] == (2.0, None)
    assert found["kfac"].over_adamw[1:] == (0.5, None)
    assert found["late"].seconds == (2.0, None, None)  # at 3 s the race is over


def test_a_time_needs_more_than_half_of_the_seeds():
    records = [record("kfac", 1, x, seed=i) for i, x in enumerate((0.1, 0.1, 0.9))]
    rows = summarize(records)
    assert times(records, rows)[0].seconds == (1.0,)
    # The same targets, but the seeds that get there are now half.
    assert times(records[1:], rows)[0].seconds == (None,)
    assert times(records, rows)[0].over_adamw == (None,)
    assert times([], []) == []


def test_the_chosen_trial_is_that_of_the_full_runs_else_the_best():
    trials = [
        record("kfac", 1, loss, phase="tuning", trial=i, settings={"lr": lr})
        for i, (lr, loss) in enumerate([(0.1, 0.5), (0.2, 0.1), (0.3, math.nan)])
    ]
    found = tuning(trials, "curves")
    assert [(t.trial, t.validation, t.chosen) for t in found] == [
        (1, 0.2, True),
        (0, 1.0, False),
        (2, None, False),
    ]
    found = tuning([*trials, record("kfac", 1, 0.4, settings={"lr": 0.1})], "curves")
    assert [t.trial for t in found if t.chosen] == [0]
    assert not any(t.chosen for t in tuning(trials[2:], "curves"))


def test_contestants_of_the_tuning_are_in_the_order_of_their_best():
    trials = [record(c, 1, x, phase="tuning") for c, x in (("a", math.inf), ("b", 0.5), ("c", 0.1))]
    assert [t.contestant for t in tuning(trials, "curves")] == ["c", "b", "a"]


def test_fisher_errors_are_by_layer_in_order_with_the_median_over_steps():
    path = [(25, 0.5), (50, 0.1), (75, math.nan), (100, 0.3)]
    path = [{"step": step, "layers": {"10": error, "2": 1.0, "4": None}} for step, error in path]
    found = fisher([record("kfac", phase="fisher", measured={"points": path})], "curves")
    assert [error.layer for error in found] == ["2", "10"]
    assert found[1].steps == (25, 50, 100)
    assert found[1].errors == (0.5, 0.1, 0.3)
    assert found[1].median == 0.3
