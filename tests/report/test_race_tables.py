"""Tables of reports: figures with their digits, all text escaped."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from smallfry.report.race_pictures import Look
from smallfry.report.race_tables import (
    cost_table,
    fisher_table,
    reported_table,
    settings,
    spread,
    time_table,
    tuning_table,
)
from smallfry.report.races import LayerError, Reach, Row, Spread, Trial
from smallfry.report.table import NONE, number, table


def body(html):
    """The cells of the body by rows, without tags."""
    rows = html[html.index("<tbody>") : html.index("</tbody>")].split("<tr")[1:]
    return [
        [re.sub("<[^>]*>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in rows
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, NONE),
        (math.nan, NONE),
        (math.inf, NONE),
        (0, "0"),
        (0.0, "0"),
        (1, "1"),
        (1.0, "1.00"),
        (9.999, "10.0"),
        (99.95, "100"),
        (0.09999, "0.100"),
        (1234, "1,234"),
        (123456.7, "123,457"),
        (1e6, "1e+06"),
        (0.00012345, "0.000123"),
        (0.00001234, "1.23e-05"),
        (-2.5, "-2.50"),
        (True, "True"),
        ("text", "text"),
    ],
)
def test_figures_have_three_digits(value, shown):
    assert number(value) == shown


@given(st.floats(1e-4, 999_000), st.integers(2, 6))
def test_a_figure_is_near_what_it_stands_for(value, digits):
    shown = float(number(value, digits).replace(",", ""))
    assert math.isclose(shown, value, rel_tol=10.0 ** (1 - digits))


def test_text_is_escaped_and_markup_is_not():
    html = table(["<head>"], [["<script>"], [Markup("<b>strong</b>")]], groups=[("<group>", 1)])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<b>strong</b>" in html
    assert "&lt;head&gt;" in html
    assert "&lt;group&gt;" in html


def test_a_table_has_its_rows_and_columns():
    html = table(["a", "b"], [[1, 2], [3, 4], [5, 6]], marked=[1], groups=[("both", 2)])
    assert body(html) == [["1", "2"], ["3", "4"], ["5", "6"]]
    assert "colspan=2" in html


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (None, NONE),
        (Spread(0.5, 0.5, 0.5), "0.5000"),
        (Spread(1.5, 1.0, 2.0), "1.500 (1.000 .. 2.000)"),
        (Spread(1.5, 1.0, math.inf), f"1.500 (1.000 .. {NONE})"),
        (Spread(math.inf, math.inf, math.inf), NONE),
    ],
)
def test_a_spread_has_its_range_where_there_is_one(values, shown):
    assert re.sub("<[^>]*>", "", str(spread(values))) == shown


def test_settings_are_on_one_line():
    assert settings({"lr": 0.001, "damping": 1.0, "rank": 2, "mode": "full"}) == (
        "lr 0.001, damping 1, rank 2, mode full"
    )
    assert settings({}) == ""


@pytest.fixture
def looks():
    names = Look._fields
    given = {"colour": "#123456", "dashes": (), "width": 1.0}
    plain = Look(**{name: given.get(name) for name in names})
    return {"kfac": plain, "adamw": plain._replace(dashes=(4, 2)), "new<": plain}


def row(contestant, **changes):
    return Row(
        problem="curves",
        phase="tuned",
        contestant=contestant,
        label=contestant.upper(),
        family="ours",
        settings=({"lr": 0.1},),
        end=40.0,
        start=0.69,
        train=Spread(0.1, 0.09, 0.2),
        validation=None,
        steps=12345.0,
        plain_ms=1.5,
        refresh_ms=None,
        mean_ms=2.0,
        mean_over_adamw=1.25,
        state_over_weights=2.0,
        diverged=1,
        seeds=3,
    )._replace(**changes)


def test_costs_of_every_contestant(looks):
    rows = [row("kfac"), row("adamw", settings=(), steps=None, train=None, diverged=0)]
    first, second = body(cost_table(rows, looks))
    assert first == [
        *("KFAC", "lr 0.1", "0.1000 (0.09000 .. 0.2000)", NONE, "12,345", "1.50", NONE, "2.00"),
        *("1.25", "2.00", "1 of 3"),
    ]
    assert second[:5] == ["ADAMW", NONE, NONE, NONE, NONE]
    assert second[-1] == "0 of 3"


def test_seeds_with_different_settings_name_both(looks):
    cells = body(cost_table([row("kfac", settings=({"lr": 0.1}, {"lr": 0.2}))], looks))
    assert cells[0][1] == "lr 0.1 or lr 0.2"


def test_lines_are_those_of_the_picture(looks):
    html = str(cost_table([row("kfac"), row("adamw")], looks))
    assert "border-top: 3px solid #123456" in html
    assert "border-top: 3px dashed #123456" in html


def test_times_have_three_columns_for_each_target(looks):
    reach = Reach("kfac", "KFAC", (1.0, None), (0.5, None), (1.0, None))
    html = time_table([reach], [0.25, 0.125], looks)
    assert body(html) == [["KFAC", "1.00", "0.500", "1.00", NONE, NONE, NONE]]
    assert "training loss 0.25" in html
    assert "training loss 0.125" in html


def test_a_trial_that_diverged_has_no_loss(looks):
    trials = [
        Trial("kfac", "KFAC", 3, {"lr": 0.1}, 0.123456, True),
        Trial("kfac", "KFAC", None, {}, None, False),
    ]
    assert body(tuning_table(trials, looks)) == [
        ["KFAC", "3", "lr 0.1", "0.1235", "chosen"],
        ["KFAC", NONE, NONE, "diverged", ""],
    ]


def test_errors_of_layers_are_in_columns_of_their_own(looks):
    errors = [
        LayerError("kfac", "KFAC", "0", (0.0,), (0.5,), 0.5),
        LayerError("kfac", "KFAC", "2", (0.0,), (0.25,), 0.25),
        LayerError("new<", "new<", "2", (0.0,), (0.125,), 0.125),
    ]
    html = fisher_table(errors, looks)
    assert "layer 0" in html
    assert body(html) == [["KFAC", "0.500", "0.250"], ["new&lt;", NONE, "0.125"]]


def test_reported_figures_keep_their_digits_and_stand_apart():
    reported = {"KFAC": {"10 epochs": 0.1589, "50 epochs": 0.1}, "other": {"50 epochs": 0.25}}
    rows = [row("kfac"), row("kfac", phase="defaults", train=Spread(0.5, 0.5, 0.5))]
    html = reported_table(reported, rows)
    assert body(html) == [
        ["KFAC", "0.1589", "0.1", "0.1000 (0.09000 .. 0.2000)", "0.5000"],
        ["other", NONE, "0.25", NONE, NONE],
    ]
    assert html.index("reported") < html.index("measured here")


def test_without_own_runs_only_reported_figures_are_shown():
    html = reported_table({"KFAC": {"10 epochs": 0.5}}, [row("kfac", phase="tuning")])
    assert body(html) == [["KFAC", "0.5"]]
    assert "measured here" not in html
