"""What pictures of races and studies show: read off the figures, which are not written."""

import numpy as np
import pytest

from smallfry.report import race_pictures, run_pictures
from smallfry.report.race_pictures import MOST_LAYERS, OURS, PEERS, looks, some, written
from smallfry.report.races import LayerError, Trial
from smallfry.report.run_pictures import Grid, Panel, Series, draw_grids, draw_panels


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written."""
    figures = []
    for module in (race_pictures, run_pictures):
        monkeypatch.setattr(module, "save", lambda figure, file: figures.append(figure))
    return figures


def record(contestant, family="ours"):
    return {"contestant": contestant, "label": contestant, "family": family, "phase": "tuned",
            "problem": "curves", "seed": 0, "trial": 0, "settings": {}, "measured": {}}  # fmt: skip


def test_ours_have_colours_and_peers_are_grey_and_dashed():
    shown = looks([record("kfac"), record("adamw", "peer"), record("ekfac"), record("sgd", "peer")])
    assert [shown[name].colour for name in ("kfac", "ekfac")] == list(OURS[:2])
    assert [shown[name].colour for name in ("adamw", "sgd")] == list(PEERS[:2])
    assert not shown["kfac"].dashes
    assert shown["adamw"].dashes
    assert shown["adamw"].dashes != shown["sgd"].dashes
    assert shown["kfac"].line["linestyle"] == "-"
    assert shown["sgd"].line["linestyle"] == (0, shown["sgd"].dashes)


def test_a_colours_second_contestant_is_dashed():
    names = [f"method {i}" for i in range(len(OURS) + 2)]
    shown = looks([record(name) for name in names])
    assert shown[names[0]].colour == shown[names[len(OURS)]].colour
    assert not shown[names[0]].dashes
    assert shown[names[len(OURS)]].dashes
    assert len({*shown.values()}) == len(names)


@pytest.mark.parametrize("count", [0, 1, MOST_LAYERS, MOST_LAYERS + 1, 50])
def test_at_most_eight_layers_are_drawn_from_the_first_to_the_last(count):
    names = [str(i) for i in range(count)]
    found = some(names)
    assert len(found) == min(count, MOST_LAYERS)
    assert found == sorted({*found}, key=int)
    if count:
        assert (found[0], found[-1]) == (names[0], names[-1])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain", "plain"),
        ("$_$", r"\$_\$"),
        ("_hidden", " _hidden"),  # or matplotlib leaves it out of the legend
        ("two\nlines", "two lines"),
        ("a\\b", "a/b"),
        ("x" * 26, "x" * 26),
        ("x" * 27, "x" * 25 + "…"),
    ],
)
def test_names_are_short_and_no_formulas(name, shown):
    assert written([name]) == [shown]


def trial(contestant, validation, chosen=False):
    return Trial(contestant, contestant, 0, {}, validation, chosen)


def test_trials_are_dots_and_the_chosen_one_is_ringed(drawn, tmp_path):
    trials = [
        trial("kfac", 0.1, True),
        trial("kfac", 0.2),
        trial("adamw", None),
        trial("adamw", 100.0),
    ]
    shown = looks([record("kfac"), record("adamw", "peer")])
    race_pictures.draw_tuning(trials, shown, tmp_path / "no.png")
    (figure,) = drawn
    (axes,) = figure.axes
    marks = [(line.get_marker(), float(line.get_xdata()[0]), float(line.get_ydata()[0]))
             for line in axes.lines]  # fmt: skip
    low, high = axes.get_xlim()
    assert [mark[0] for mark in marks] == ["o", "o", "o", "x", ">"]
    assert marks[0][1:] == marks[1][1:] == (0.1, 0.0)  # a dot and its ring
    assert marks[2][1:] == (0.2, 0.0)
    assert marks[3][1:] == marks[4][1:] == (pytest.approx(high), 1.0)
    assert low < 0.1
    assert high < 100
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["a trial", "the chosen one", "diverged", "beyond this axis"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["kfac", "adamw"]


def test_trials_that_all_diverged_can_be_drawn(drawn, tmp_path):
    race_pictures.draw_tuning([trial("kfac", None)], looks([record("kfac")]), tmp_path / "no.png")
    assert [line.get_marker() for line in drawn[0].axes[0].lines] == ["x"]


@pytest.mark.parametrize(("errors", "scale"), [((0.5, 0.4), "linear"), ((1.0, 0.001), "log")])
def test_errors_of_layers_have_one_scale(drawn, tmp_path, errors, scale):
    shown = looks([record("kfac")])
    found = [
        LayerError("kfac", "KFAC", layer, (0.0, 50.0), errors, sum(errors) / 2)
        for layer in ("0", "2", "4")
    ]
    race_pictures.draw_fisher(found, shown, tmp_path / "no.png")
    axes = [each for each in drawn[0].axes if each.get_visible()]
    assert [each.get_title() for each in axes] == ["layer 0", "layer 2", "layer 4"]
    assert {each.get_yscale() for each in axes} == {scale}
    assert [list(each.lines[0].get_ydata()) for each in axes] == [list(errors)] * 3


def test_no_errors_are_an_empty_picture(drawn, tmp_path):
    race_pictures.draw_fisher([], {}, tmp_path / "no.png")
    assert not [axes for axes in drawn[0].axes if axes.get_visible()]


def test_a_label_has_one_colour_in_all_panels_and_reported_figures_are_hollow(drawn, tmp_path):
    ours = Series("ViT", [1.0, 10.0], [80.0, 90.0], error=[1.0, None])
    theirs = Series("ViT", [2.0], [85.0], reported=True)
    other = Series("CCT", [3.0], [70.0])
    panels = [Panel("one", "parameters", [ours, theirs]), Panel("two", "MACs", [other, ours])]
    draw_panels(panels, tmp_path / "no.png")
    first, second = drawn[0].axes
    assert [first.get_title(), second.get_xlabel()] == ["one", "MACs"]
    line, hollow = (each for each in first.lines if each.get_label().startswith("_child"))
    assert line.get_color() == hollow.get_color()
    assert hollow.get_markerfacecolor() == "white"
    assert line.get_markerfacecolor() == line.get_color()
    assert list(line.get_ydata()) == [80.0, 90.0]
    (bars,) = first.collections
    segments = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert segments == [[79.0, 81.0], [90.0, 90.0]]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["ViT", "CCT", "measured here", "reported"]


def test_points_that_are_not_joined_have_no_line_and_long_lines_no_marks(drawn, tmp_path):
    long = Series("long", list(range(1, 40)), [1.0] * 39)
    panels = [
        Panel("joined", "epoch", [long], log=False),
        Panel("apart", "x", [long], joined=False),
    ]
    draw_panels(panels, tmp_path / "no.png")
    joined, apart = (axes.lines[0] for axes in drawn[0].axes)
    assert joined.get_linestyle() == "-"
    assert joined.get_marker() in ("None", None, "")
    assert apart.get_linestyle() == "None"
    assert apart.get_marker() == "o"


def test_an_empty_panel_says_so(drawn, tmp_path):
    draw_panels([Panel("none", "x", [])], tmp_path / "no.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["nothing yet"]


def test_given_ticks_are_taken(drawn, tmp_path):
    series = Series("a", [16.0, 64.0, 256.0], [1.0, 2.0, 3.0])
    draw_panels([Panel("b", "batch size", [series], ticks=(16, 64, 256))], tmp_path / "no.png")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    assert list(axes.xaxis.get_majorticklocs()) == [16, 64, 256]
    low, high = axes.get_xlim()
    assert low < 16 < 256 < high


def test_grids_show_every_value_and_frame_the_chosen_one(drawn, tmp_path):
    grids = [
        Grid("accuracy", ("n", (1, 3)), ("T", (1, 2)), [[90.0, None], [95.125, 91.0]],
             ringed=(1, 0)),
        Grid("minutes", ("n", (1, 3)), ("T", (1, 2)), [[1.5, 2.0], [3.0, 1234.5]], percent=False),
    ]  # fmt: skip
    draw_grids(grids, tmp_path / "no.png")
    first, second = drawn[0].axes
    assert [text.get_text() for text in first.texts] == ["90.00", "–", "95.12", "91.00"]
    assert [text.get_text() for text in second.texts] == ["1.50", "2.00", "3.00", "1,234"]
    (frame,) = first.patches
    assert (frame.get_x(), frame.get_y()) == pytest.approx((-0.47, 0.53))
    assert not second.patches
    assert [label.get_text() for label in first.get_yticklabels()] == ["1", "3"]
    colours = [text.get_color() for text in first.texts]
    assert colours[0] == "white"  # on the darkest
    assert colours[2] == "black"
    values = first.images[0].get_array()
    assert np.ma.getmaskarray(values)[0, 1] or np.isnan(values[0, 1])


def test_a_grid_without_any_value_can_be_drawn(drawn, tmp_path):
    draw_grids([Grid("none", ("n", (1,)), ("T", (1,)), [[None]])], tmp_path / "no.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["–"]


def test_more_panels_than_three_go_on_in_the_next_row(drawn, tmp_path):
    series = Series("a", [1.0, 10.0], [1.0, 2.0])
    draw_panels([Panel(name, "x", [series]) for name in "abcde"], tmp_path / "no.png")
    shown = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list("abcde")
    drawn[0].canvas.draw()
    places = [axes.get_position() for axes in shown]
    assert [round(place.x0, 2) for place in places[3:]] == [round(p.x0, 2) for p in places[:2]]
    assert min(place.y0 for place in places[:3]) > max(place.y1 for place in places[3:])
