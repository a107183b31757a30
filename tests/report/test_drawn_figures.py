"""Figures of searches, fits, bits, rates and ranges, read off the axes that were drawn."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from smallfry.report import fit, search
from smallfry.report.bits import draw_trade_off
from smallfry.report.figure import COLOURS
from smallfry.report.fit import Mark, draw_fit
from smallfry.report.puzzles import GIVEN, PLAIN, WRONG, draw_puzzles
from smallfry.report.quantization import draw_ranges
from smallfry.report.rates import draw_rates
from smallfry.report.search import Point, draw_search


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line(axes, label):
    [found] = [each for each in axes.lines if each.get_label() == label]
    return found.get_xydata().tolist()


# Fronts


NUMBERS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(NUMBERS)
def test_a_front_has_what_no_cheaper_one_equals(numbers):
    points = [Point(float(accuracy), float(cost)) for accuracy, cost in numbers]
    marks = [Mark("m", float(accuracy), float(cost), 1.0) for accuracy, cost in numbers]
    wanted = []
    for cost in sorted({cost for _, cost in numbers}):
        best = max(a for a, c in numbers if c == cost)
        if all(a < best for a, c in numbers if c < cost):
            wanted.append((best, cost))
    assert [(p.accuracy, p.macs) for p in search.pareto(points)] == wanted
    assert [(m.accuracy, m.kb) for m in fit.pareto(marks, "kb")] == wanted


# Searches


def test_a_search_has_its_best_so_far_its_front_and_shares(figures, tmp_path):
    own = [Point(50.0, 2e6), Point(40.0, 1e6), Point(70.0, 4e6, True), Point(60.0, 8e6)]
    found = {"$bayes": own, "random": [Point(45.0, 1e6)]}
    shares = {"$depth": 0.25, "_width": 0.75}
    predicted = [(51.0, 50.0), (39.0, 45.0)]
    draw_search(found, shares, tmp_path / "a.png", "accuracy", predicted)
    best, front, bars, compared = figures[0].axes
    assert line(best, "$bayes") == [[1, 50], [2, 50], [3, 70], [4, 70]]
    assert line(best, "random") == [[1, 45]]
    assert line(front, "front of all") == [[1, 45], [2, 50], [4, 70]]
    assert front.get_xscale() == "log"
    low, high = front.get_xlim()
    assert low < 1 < 8 < high
    ringed = [each.get_offsets().tolist() for each in front.collections if not len(
        each.get_facecolors())]  # fmt: skip
    assert ringed == [[[4.0, 70.0]]]
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == [r"\$depth", "_width"]
    assert [bar.get_width() for bar in bars.patches] == [25, 75]
    assert compared.collections[0].get_offsets().tolist() == [[51, 50], [39, 45]]
    assert line(compared, "equal") == [[39, 39], [51, 51]]


def test_one_prediction_is_no_panel(figures, tmp_path):
    draw_search({"a": [Point(1.0, 1e6)]}, {}, tmp_path / "a.png", predicted=[(1.0, 2.0)])
    assert len(figures[0].axes) == 3


# Fits


def test_a_fit_has_trials_exports_limits_and_the_choice(figures, tmp_path):
    marks = [
        Mark("trial", 60.0, 100.0, 3.0),
        Mark("$small", 70.0, 50.0, 4.0, exported=True),
        Mark("large", 80.0, 200.0, 2.0, exported=True, chosen=True),
    ]
    draw_fit(marks, {"kb": 150.0, "ms": None}, tmp_path / "a.png")
    kb, ms = figures[0].axes
    assert line(kb, "front of the exports") == [[50, 70], [200, 80]]
    assert "front of the exports" not in [each.get_label() for each in ms.lines]
    assert line(kb, "budget") == [[150, 0], [150, 1]]
    assert "budget" not in [each.get_label() for each in ms.lines]
    places = {each.get_label(): each.get_offsets().tolist() for each in kb.collections}
    assert places == {
        "trained, at its expected cost": [[100, 60]],
        "exported and verified": [[50, 70], [200, 80]],
        "chosen": [[200, 80]],
    }
    assert [text.get_text() for text in kb.texts] == ["large"]
    [shown] = figures[0].legends
    assert [text.get_text() for text in shown.get_texts()] == [
        *("trained, at its expected cost", "exported and verified", "chosen"),
        *("front of the exports", "budget"),
    ]
    assert kb.get_xlim()[0] < 50 < 200 < kb.get_xlim()[1]


def test_a_limit_beyond_all_marks_is_within_the_axis(figures, tmp_path):
    draw_fit([Mark("a", 1.0, 10.0, 1.0)], {"kb": 5000.0, "ms": 0.01}, tmp_path / "a.png")
    kb, ms = figures[0].axes
    assert kb.get_xlim()[1] > 5000
    assert ms.get_xlim()[0] < 0.01
    draw_fit([], {"kb": None, "ms": None}, tmp_path / "a.png")
    assert figures[1].legends == []


# Bits


@pytest.mark.parametrize(("least", "scale"), [(0.001, "log"), (0.0, "log")])
def test_bits_have_their_front_uniform_bits_and_the_choice(least, scale, figures, tmp_path):
    mixed = {
        "front": [(10.0, 1.0), (20.0, 0.1), (40.0, least)],
        "uniform": {"4": {"cost": 12.0, "loss": 2.0}, "8": {"cost": 44.0, "loss": 0.5}},
        **{"cost": 20.0, "loss": 0.1, "unit": "kB", "measure": "kfac"},
    }
    draw_trade_off(mixed, tmp_path / "bits.png")
    [axes] = figures[0].axes
    assert line(axes, "mixed") == [[10, 1], [20, 0.1], [40, least]]
    assert line(axes, "uniform") == [[12, 2], [44, 0.5]]
    assert line(axes, "chosen") == [[20, 0.1]]
    assert [text.get_text() for text in axes.texts] == ["4 bits", "8 bits"]
    assert axes.get_yscale() == scale
    assert axes.get_xlabel() == "cost, kB"
    assert axes.get_ylabel() == "summed sensitivity (kfac)"


def test_bits_without_any_loss_are_on_a_plain_axis(figures, tmp_path):
    mixed = {
        **{"front": [(1.0, 0.0)], "uniform": {}, "cost": 1.0, "loss": 0.0, "unit": "kB"},
        "measure": "x",
    }
    draw_trade_off(mixed, tmp_path / "bits.png")
    assert figures[0].axes[0].get_yscale() == "linear"


# Rates


@pytest.mark.parametrize("suggestion", [None, 0.03])
def test_rates_have_losses_and_the_suggestion(suggestion, figures, tmp_path):
    rates, losses = [0.001, 0.01, 0.1], [2.0, 1.0, float("nan")]
    draw_rates(rates, losses, [2.0, 1.5, 1.2], suggestion, tmp_path / "a.png")
    [axes] = figures[0].axes
    assert axes.get_xscale() == "log"
    assert line(axes, "smoothed") == [[0.001, 2], [0.01, 1.5], [0.1, 1.2]]
    names = ["loss of a step", "smoothed"]
    assert legend(axes) == names + (["suggestion: 0.03"] if suggestion else [])
    if suggestion:
        assert line(axes, "suggestion: 0.03") == [[0.03, 0], [0.03, 1]]


# Ranges


class Span(NamedTuple):
    product: str
    layer: int
    step: int
    application: int
    low: float
    high: float


def test_ranges_have_a_line_for_each_layer_and_a_bar_of_one_scale(figures, tmp_path):
    spans = [
        Span(product, layer, 1 + (a > 2), a, -a - layer, 2.0 * a)
        for product in ("qkv", "mlp", "out")
        for a in (3, 1, 2, 4)
        for layer in (1, 0)
    ]
    draw_ranges(spans, tmp_path / "a.png")
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [f"input of {n}" for n in ("qkv", "mlp", "out")]
    for axes in panels:
        lines = [each.get_xydata().tolist() for each in axes.lines if len(each.get_xdata()) == 4]
        assert lines == [
            [[a, sign] for a, sign in zip(range(1, 5), values, strict=True)]
            for layer in (0, 1)
            for values in ([-a - layer for a in range(1, 5)], [2 * a for a in range(1, 5)])
        ]
        bars = [each.get_ydata() for each in axes.lines if each.get_linewidth() == 5]
        assert [[*bar] for bar in bars] == [[-4, 8], [-5, 8]]
        marks = [label.get_text() for label in axes.get_xticklabels()]
        assert marks == ["z", "y", "z", "y"]  # the last of each recursion step is the answer
        assert [text.get_text() for text in axes.texts] == ["step 1", "step 2"]
    [shown] = figures[0].legends
    assert [text.get_text() for text in shown.get_texts()][:2] == ["layer 0", "layer 1"]
    assert shown.get_lines()[0].get_color() == COLOURS[0]


# Puzzles


def test_puzzles_have_givens_in_grey_and_wrong_cells_with_the_right_symbol(figures, tmp_path):
    symbols = ("_", ".", "1", "$")
    grids = torch.tensor([[[2, 1], [1, 3]]]).repeat(5, 1, 1)
    right = torch.tensor([[2, 3, 2, 3]]).repeat(5, 1)
    answers = right.clone()
    answers[1, 1:3] = torch.tensor([2, 3])
    draw_puzzles(grids, right, answers, symbols, tmp_path / "a.png")
    drawn = figures[0].axes
    assert [axes.get_title() for axes in drawn] == ["solved", "2 wrong", *["solved"] * 3, *[""] * 3]
    colours = [to_hex(p.get_facecolor()) for p in drawn[1].patches[:4]]
    assert colours == [to_hex(c) for c in (GIVEN, WRONG, WRONG, GIVEN)]
    assert [text.get_text() for text in drawn[1].texts] == ["1", "1/$", "$/1", "$"]
    solved = [to_hex(p.get_facecolor()) for p in drawn[0].patches[:4]]
    assert solved == [to_hex(c) for c in (GIVEN, PLAIN, PLAIN, GIVEN)]
    assert np.allclose(drawn[0].patches[1].get_xy(), (1, 0))
