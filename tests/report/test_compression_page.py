"""Page of a compression, and its pictures."""

import math

import pytest
from matplotlib.colors import to_hex

from smallfry.report.compression import MOST, draw_layers, draw_profile, shorten
from smallfry.report.compression_page import write_compression
from smallfry.report.figure import COLOURS

ROWS = [("parameters", "100", "50", "× 0.500")]
PROFILE = {
    "choices": "share",
    "costs": "nats",
    "layers": {"a": {"0.5": 0.1, "1": 0.0}, "b": {"0.1": 20.0, "0.5": None, "1": 0.0}},
    "chosen": {"a": "0.5", "b": "1"},
}
MIXED = {
    "front": [[8, 0.2], [16, 0.1]],
    "uniform": {"2": {"cost": 8, "loss": 0.2}},
    **{"cost": 16, "loss": 0.1, "unit": "bits", "measure": "fisher", "average_bits": 3.2},
}


def layer(name, before=100, after=50):
    pair = {"before": before, "after": after}
    return {"name": name, "parameters": pair, "bytes": pair, "macs": pair}


def summary(layers, reports=()):
    methods = [{"low_rank": {"keep": 0.5}}]
    return {"methods": methods, "layers": layers, "reports": reports, "validation_images": 1234}


def bars(figure, label):
    """Lengths of the bars of each panel."""
    return [
        [bar.get_width() for bar in container]
        for axes in figure.axes
        for container in axes.containers
        if container.get_label() == label
    ]


def names(figure):
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_every_layer_has_bars_before_and_after_and_its_change(figures, tmp_path):
    gone, new, same = layer("gone", 40, 0), layer("new", 0, 8), layer("same", 60, 60)
    draw_layers([layer("half"), gone, new, same], tmp_path / "layers.png")
    [figure] = figures
    assert names(figure) == ["half", "gone", "new", "same"]
    assert bars(figure, "before") == [[100, 40, 0, 60]] * 3
    assert bars(figure, "after") == [[50, 0, 8, 60]] * 3
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["× 0.5", "gone", "new"]
        assert axes.get_xlim()[1] > 100
        assert axes.yaxis.get_inverted()
    assert [axes.get_title() for axes in figure.axes] == [
        *("parameters", "stored weights", "multiply-accumulates, one image"),
    ]
    formats = [axes.xaxis.get_major_formatter()(25_000) for axes in figure.axes]
    assert formats == ["25k", "25 kB", "25k"]


def test_small_layers_that_stay_are_one_row_and_changed_ones_are_not(figures, tmp_path):
    small = [layer(f"norm{i}", 2, 2) for i in range(3)]
    draw_layers([*small, layer("big", 1000, 1000), layer("cut", 2, 1)], tmp_path / "layers.png")
    assert names(figures[0]) == ["big", "cut", "3 others"]
    assert bars(figures[0], "before")[0] == [1000, 2, 6]


def test_of_very_many_layers_the_largest_have_rows_and_the_rest_is_added_up(figures, tmp_path):
    count = MOST + 50
    layers = [layer(f"layer{i}", 100 + i, 50) for i in range(count)]
    draw_layers(layers, tmp_path / "layers.png")
    assert names(figures[0]) == [*(f"layer{i}" for i in range(50, count)), "50 others"]
    assert bars(figures[0], "after")[0][-1] == 50 * 50
    height = figures[0].get_size_inches()[1]
    assert height / (MOST + 1) > 0.2  # inches for each name


def test_long_names_lose_their_middle():
    assert shorten("a" * 50 + "b" * 50) == "a" * 30 + "…" + "b" * 29
    assert shorten("blocks.0.mlp.fc1") == "blocks.0.mlp.fc1"


def test_a_model_of_one_layer_without_products_is_drawn(figures, tmp_path):
    draw_layers([layer("(model)", 1, 1), layer("$_$", 0, 0)], tmp_path / "layers.png")
    assert names(figures[0]) == ["(model)", "1 other"]


def test_a_profile_has_a_cell_for_each_choice_and_frames_the_chosen_one(figures, tmp_path):
    draw_profile(PROFILE, tmp_path / "profile.png")
    axes, bar = figures[0].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "0.5", "1"]
    assert names(figures[0]) == ["a", "b"]
    costs = axes.images[0].get_array()
    assert costs[0, 1] == 0.1
    assert costs[1, 0] == 20
    assert costs.mask.tolist() == [[True, False, False], [False, True, False]]
    assert [text.get_text() for text in axes.texts] == ["0.1", "0", "20", "0"]
    frames = [patch.get_xy() for patch in axes.patches]
    assert frames == [(0.5, -0.5), (1.5, 0.5)]
    assert {to_hex(patch.get_edgecolor()) for patch in axes.patches} == {COLOURS[0]}
    assert axes.get_xlabel() == "share"
    assert bar.get_ylabel() == "nats"


def test_a_profile_of_very_many_layers_has_the_most_sensitive(figures, tmp_path):
    layers = {f"layer{i}": {"2": float(i), "4": 0.0} for i in range(MOST + 3)}
    chosen = dict.fromkeys(layers, "4")
    draw_profile({**PROFILE, "layers": layers, "chosen": chosen}, tmp_path / "profile.png")
    assert names(figures[0]) == [f"layer{i}" for i in range(3, MOST + 3)]
    assert f"({MOST} of {MOST + 3})" in figures[0].axes[0].get_title()


@pytest.mark.parametrize("cost", [0.0, 0.3, None])
def test_a_profile_of_one_cell_is_drawn(cost, figures, tmp_path):
    profile = {**PROFILE, "layers": {"a": {"1": cost}}, "chosen": {"a": "1"}}
    draw_profile(profile, tmp_path / "profile.png")
    assert math.isfinite(figures[0].axes[0].images[0].norm.vmax)


def test_the_page_has_figures_pictures_of_reports_and_all_layers(figures, tmp_path):
    reports = [
        {"method": "low_rank", "profile": PROFILE},
        {"method": "other"},
        {"method": "quantize", "profile": PROFILE, "mixed": MIXED},
        {"method": "erase_operators", "lists": {"branches erased": ["a", "<i>"], "empty": []}},
    ]
    layers = [layer("<b>", 1234567, 50), layer("gone", 7, 0)]
    page = write_compression(
        tmp_path, "Small & new", ROWS, summary(layers, reports), {"parent": "a"}
    )
    assert page == tmp_path / "compression.html"
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == [
        *("bits.png", "layers.png", "profile.png", "profile_2.png"),
    ]
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4
    for words in (
        *("<h1>Small &amp; new</h1>", "× 0.500", "1,234 validation images", "keep 0.5"),
        *("<h2>Sensitivity of each layer: low_rank</h2>", "3.2 bits on average"),
        *("<h2>Layers by name: erase_operators</h2>", ">branches erased<", ">a, &lt;i&gt;<"),
        *(">&lt;b&gt;<", ">1,234,567<", ">–<", "stored weights, B", ">parent<"),
    ):
        assert words in text
    assert "<b>" not in text
    assert ">empty<" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_a_page_without_images_or_reports_is_complete(figures, tmp_path):
    given = {**summary([layer("head")]), "validation_images": 0}
    text = write_compression(tmp_path, "Small", ROWS, given, {}).read_text()
    assert "No validation images were at hand." in text
    assert text.count("<img") == 1
    assert "Sensitivity" not in text
