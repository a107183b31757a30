"""Figures of a study's runs, tables, and labels of points."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from smallfry.report.labels import Box, place_labels
from smallfry.report.runs import (
    Outcome,
    accuracy_cell,
    best_of,
    deviation,
    mean,
    protocol,
    runs_table,
    strong,
    where,
)
from smallfry.report.table import NONE, number, table

MEASURED = {
    "best_epoch": 2, "epochs": 3, "select_on": "validation", "training_seconds": 90.0,
    "seed": 0, "parameters": 12_345, "macs": 6_780_000,
}  # fmt: skip
HISTORY = [{"validation_accuracy": value} for value in (0.5, 0.7, 0.6)]


def outcome(accuracy=0.8, name="run", history=HISTORY, seed=0, **measured):
    test = {} if accuracy is None else {"test": {"accuracy": accuracy}}
    summary = {"measured": MEASURED | test | measured}
    return Outcome(name, {"seed": seed, "n": 1}, summary, history)


def failure(reason="it diverged", **facts):
    return Outcome("bad", {"seed": 1, **facts}, None, [], reason)


def test_figures_of_a_run_are_in_percent_and_minutes():
    run = outcome()
    assert run.test == pytest.approx(80.0)
    assert run.selected == pytest.approx(70.0)
    assert run.minutes == 1.5


@pytest.mark.parametrize("best", [None, 0, 4])
def test_a_best_epoch_outside_of_the_history_has_no_figure(best):
    assert outcome(best_epoch=best).selected is None
    assert outcome(history=[{}, {}]).selected is None


def test_a_failed_run_has_no_figures():
    run = failure()
    assert (run.test, run.selected, run.minutes, run.measured("seed")) == (None,) * 4


def test_runs_are_selected_by_all_facts():
    runs = [outcome(seed=0), outcome(seed=1), failure(n=2)]
    assert where(runs, seed=1) == runs[1:]
    assert where(runs, seed=1, n=1) == runs[1:2]
    assert where(runs) == runs
    assert where(runs, absent=None) == runs  # a fact that no run has is none


def test_means_are_of_what_is_known_and_finite():
    runs = [outcome(0.8), outcome(0.6), outcome(math.nan), outcome(None), failure()]
    assert mean(runs, lambda o: o.test) == pytest.approx(70.0)
    assert deviation(runs, lambda o: o.test) == pytest.approx(200**0.5)
    assert mean(runs[3:], lambda o: o.test) is None
    assert deviation(runs[1:], lambda o: o.test) is None


@pytest.mark.parametrize(
    ("runs", "cell"),
    [
        ([], NONE),
        ([outcome(0.8)], "80.00"),
        ([outcome(0.8), outcome(0.6)], "70.00 ± 14.14"),
        ([failure()], "failed"),
        ([failure("out of memory: 3 GiB")], "out of memory"),
        ([outcome(0.8), failure()], "80.00 <span class=range>(1 of 2 failed)</span>"),
        ([outcome(None)], NONE),
        ([outcome(math.nan), outcome(None)], NONE),
        ([outcome(None), failure()], "failed"),
    ],
)
def test_a_cell_of_accuracies(runs, cell):
    assert str(accuracy_cell(runs)) == cell


def with_selected(value, **given):
    return outcome(history=[{}, {"validation_accuracy": value}], **given)


def test_the_best_has_the_highest_mean_on_the_selecting_split():
    groups = {"a": [with_selected(0.5)], "b": [with_selected(0.9), with_selected(0.3)]}
    assert best_of(groups) == "b"
    assert best_of({"a": [with_selected(0.5)], "b": [with_selected(0.5)]}) == "a"
    assert best_of({"a": [failure()]}) is None
    assert best_of({}) is None


def test_a_kind_that_failed_once_wins_only_among_such():
    groups = {"a": [with_selected(0.5)], "b": [with_selected(0.9), failure()]}
    assert best_of(groups) == "a"
    groups["a"].append(failure())
    assert best_of(groups) == "b"


def test_the_protocol_names_every_split_that_chose():
    assert protocol([]) == "nothing has ended yet"
    assert protocol([failure()]) == "nothing has ended yet"
    both = protocol([outcome(), outcome(select_on="test")])
    assert both.startswith("best epoch by test (the paper's protocol, which flatters) and best")


def test_every_run_is_in_the_table_and_escaped():
    text = str(runs_table([outcome(name="<b>one</b>"), failure(), outcome(None)]))
    assert "&lt;b&gt;one&lt;/b&gt;" in text
    assert "<b>one" not in text
    for cell in ("80.00", "70.00", "2 of 3", "12,345", "6.78", "failed", "1.50"):
        assert cell in text, cell
    assert str(strong("<i>")) == "<b>&lt;i&gt;</b>"


# Numbers and tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, NONE),
        (math.nan, NONE),
        (math.inf, NONE),
        (0, "0"),
        (0.0, "0"),
        (1, "1"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (-12.345, "-12.3"),
        (9.999, "10.0"),
        (0.09996, "0.100"),
        (999.6, "1,000"),
        (1234.5, "1,234"),
        (123_456, "123,456"),
        (1e6, "1e+06"),
        (0.000123, "0.000123"),
        (0.0000123, "1.23e-05"),
        ("text", "text"),
        (True, "True"),
    ],
)
def test_a_number_has_its_digits(value, text):
    assert number(value) == text


@settings(deadline=None)
@given(st.floats(1e-4, 9.9e5), st.integers(1, 6))
def test_a_number_is_off_by_half_of_its_last_digit(value, digits):
    found = float(number(value, digits).replace(",", ""))
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    least = 0.5 if value >= 10**digits else 0.0  # whole numbers are written out
    assert abs(found - value) <= max(0.501 * step, least)


def test_tables_have_their_heads_groups_and_marks():
    text = str(table(["a", "b"], [["<x>", 1], [Markup("<i>y</i>"), 2]], groups=[("both", 2)],
                     marked=[1]))  # fmt: skip
    assert "&lt;x&gt;" in text
    assert "<i>y</i>" in text
    assert "both" in text
    assert 'colspan="2"' in text or "colspan=2" in text
    assert text.count("<tr") == 4
    assert "<td" in str(table(["a"], [["1"]]))


# Labels

BOX = st.tuples(st.floats(0, 180), st.floats(0, 180)).map(
    lambda p: Box(p[0], p[1], p[0] + 8, p[1] + 8)
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(BOX, st.floats(5, 60)), max_size=8))
def test_labels_lie_in_the_frame_on_nothing_else(items):
    points, frame = [box for box, _ in items], Box(0, 0, 200, 200)
    sizes = [(width, 10.0) for _, width in items]
    placed = place_labels(sizes, points, frame)
    found = [box for box in placed if box is not None]
    for number_, box in enumerate(found):
        assert box.inside(frame)
        assert not any(box.overlaps(point) for point in points)
        assert not any(box.overlaps(other) for other in found[:number_])
    for box, (width, height) in zip(placed, sizes, strict=True):
        if box is not None:
            assert (box.right - box.left, box.top - box.bottom) == pytest.approx((width, height))


def test_the_first_place_is_to_the_right_and_the_next_to_the_left():
    frame, point = Box(0, 0, 100, 100), Box(45, 45, 55, 55)
    right, left = place_labels([(20, 10), (20, 10)], [point, point], frame)
    assert right.left == 56
    assert left.right == 44
    assert (right.bottom + right.top) / 2 == 50


def test_a_label_without_room_is_left_out_and_the_others_are_not():
    frame, point = Box(0, 0, 100, 100), Box(45, 45, 55, 55)
    assert place_labels([(200, 10), (20, 10)], [point, point], frame)[0] is None
    assert place_labels([(200, 10), (20, 10)], [point, point], frame)[1] is not None
    assert place_labels([], [], frame) == []


def test_boxes_that_touch_do_not_overlap():
    one, beside = Box(0, 0, 1, 1), Box(1, 0, 2, 1)
    assert not one.overlaps(beside)
    assert one.overlaps(Box(0.5, 0.5, 3, 3))
    assert Box(0.5, 0.5, 3, 3).overlaps(one)
    assert one.inside(one)
    assert not beside.inside(one)
