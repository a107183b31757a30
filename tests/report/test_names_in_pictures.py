"""Names in pictures: no formula, in every legend, whole after they were shortened."""

import re
import warnings

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.font_manager import FontProperties, findfont, get_font

from smallfry.report import batch, classification, corruptions, curves, multilabel, recursion
from smallfry.report.figure import (
    _note_numbers,
    encode,
    in_legend,
    log,
    new_figure,
    plain,
    style,
)

NAMES = ["_background_", "$a$ & $b", "日本", "<b>", "𝔞\\$"]


@pytest.fixture(autouse=True)
def _no_warning():
    """A warning, such as of a letter that the font lacks, is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def seen(text):
    """A text as it is drawn, which shows that it is no formula, with the letters of its numbers."""
    assert (text.count("$") - text.count(r"\$")) == 0
    read = re.sub(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})", lambda m: chr(int(m[1] or m[2], 16)), text)
    return read.replace(r"\$", "$").strip()


def legends(figure):
    every = [each.get_legend() for each in figure.axes] + figure.legends
    return [[seen(t.get_text()) for t in each.get_texts()] for each in every if each is not None]


def titles(figure):
    return [seen(axes.get_title()) for axes in figure.axes if axes.get_title()]


def images(count, channels=3):
    return torch.zeros(count, channels, 6, 8, dtype=torch.uint8)


def test_names_are_escaped_once_each():
    assert plain(["$x$", r"\$", "a_b"]) == [r"\$x\$", r"\\$", "a_b"]
    assert in_legend(["_x", "x_", "$_", ""]) == [" _x", "x_", r"\$_", ""]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("猫", r"\u732b"),
        ("cat 猫", r"cat \u732b"),
        ("日本", r"\u65e5\u672c"),
        ("🐈", r"\U0001f408"),
        ("\ud800", r"\ud800"),  # half a letter, at which matplotlib ends
        ("çédille Ω ж", "çédille Ω ж"),
        ("$猫$", r"\$\u732b\$"),
        ("line\nbreak", "line\nbreak"),
    ],
)
def test_letters_that_no_font_has_are_written_as_their_numbers(name, shown):
    with rc_context({"font.family": ["DejaVu Sans"]}):
        assert plain([name, "a"]) == [shown, "a"]
        assert in_legend([name]) == [shown]
        with style():
            figure = new_figure(2, 1)
            figure.subplots().set_title(plain([name])[0])
            with warnings.catch_warnings():  # of a letter that the font lacks, too
                warnings.simplefilter("error")
                assert encode(figure).startswith(b"\x89PNG")


def test_letters_of_any_font_that_the_user_has_named_are_kept():
    """STIX has integrals that DejaVu's script lacks, and both are parts of matplotlib."""
    file = findfont(FontProperties(family="STIXGeneral"), fallback_to_default=False)
    first, second = ({*get_font(each).get_charmap()} for each in (findfont("DejaVu Sans"), file))
    own = chr(min(number for number in second - first if number > 127))
    with rc_context({"font.family": ["DejaVu Sans"]}):
        assert plain([own]) == [own.encode("ascii", "backslashreplace").decode()]
    with rc_context({"font.family": ["DejaVu Sans", "no such font", "STIXGeneral"]}):
        assert plain([own]) == [own]
    with rc_context({"font.family": ["no such font"]}):
        assert plain(["ж猫"]) == [r"ж\u732b"]


def test_one_note_is_given_on_letters_that_no_font_has(monkeypatch):
    notes = []
    monkeypatch.setattr(log, "info", lambda text, *values: notes.append(text % values))
    _note_numbers.cache_clear()
    with rc_context({"font.family": ["STIXGeneral"]}):
        assert plain(["a", "ж"]) == ["a", "ж"]
        assert not notes
        for _ in range(2):
            plain(["猫", "犬"])
    (note,) = notes
    assert r"such as \u732b, for letters that are in no font" in note
    assert "(STIXGeneral): add a family" in note


def test_a_letter_that_the_font_lacks_is_drawn_without_a_word():
    with style():
        figure = new_figure(2, 1)
        figure.subplots().set_title("日本")
        assert encode(figure).startswith(b"\x89PNG")
    with pytest.raises(UserWarning, match="of another kind"), style():
        warnings.warn("of another kind", UserWarning, stacklevel=1)


def test_every_class_is_in_the_legend_of_precision_and_recall(figures, tmp_path):
    labels = torch.eye(5, dtype=torch.int64).repeat(2, 1)
    shares = torch.rand(10, 5)
    row = {"precision": 0.25, "recall": 0.5}
    scores = {name: row | {"images": i} for i, name in enumerate(NAMES)}
    multilabel.curves(shares, labels, scores, tmp_path / "a.png")
    assert legends(figures[0]) == [NAMES[::-1]]  # the most frequent first
    lines = figures[0].axes[0].lines
    for number, i in enumerate(reversed(range(5))):
        order = shares[:, i].argsort(descending=True)
        hits = labels[order, i].cumsum(0).double()
        np.testing.assert_allclose(lines[2 * number].get_xdata(), hits / 2)
        np.testing.assert_allclose(lines[2 * number].get_ydata(), hits / torch.arange(1, 11))
        assert (*lines[2 * number + 1].get_xydata()[0],) == (0.5, 0.25)


def test_curves_of_no_images_and_of_a_class_without_any_are_drawn(figures, tmp_path):
    row = {"precision": 0.0, "recall": 0.0, "images": 0}
    none = torch.zeros(0, 1)
    multilabel.curves(none, none.long(), {"a": row}, tmp_path / "a.png")
    assert len(figures[0].axes[0].lines[0].get_xdata()) == 0
    lacking = torch.zeros(3, 1, dtype=torch.int64)
    multilabel.curves(torch.rand(3, 1), lacking, {"a": row}, tmp_path / "a.png")
    assert [*figures[1].axes[0].lines[0].get_xdata()] == [0, 0, 0]


def test_bars_have_every_class_the_worst_first(figures, tmp_path):
    row = {"f1": 0.5, "images": 3}
    scores = {name: row | {"average_precision": 0.1 * (5 - i)} for i, name in enumerate(NAMES)}
    multilabel.class_bars(scores, tmp_path / "a.png")
    [axes] = figures[0].axes
    assert [seen(label.get_text()) for label in axes.get_yticklabels()] == [
        f"{name} (3)" for name in reversed(NAMES)
    ]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths[0] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert widths[1] == [0.5] * 5
    many = {f"c{i}": row | {"average_precision": i / 99} for i in range(60)}
    multilabel.class_bars(many, tmp_path / "a.png")
    assert len(figures[1].axes[0].get_yticklabels()) == multilabel.MOST_CLASSES


def test_the_worst_images_have_what_is_missing_and_too_many(figures, tmp_path):
    chosen = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    labels = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 1]]).bool()
    multilabel.worst_images(images(3), chosen, labels, NAMES, tmp_path / "a.png")
    assert titles(figures[0]) == ["right", "+$a$ & $b −日本 −<b>", "+日本 −_background_ −𝔞\\$"]
    long = ["x" * 38 + "$" * 9]
    multilabel.worst_images(images(1), chosen[:1, :1], ~chosen[:1, :1], long, tmp_path / "a.png")
    assert titles(figures[1]) == ["+" + "x" * 38 + "$"]
    multilabel.worst_images(images(0), chosen[:0], labels[:0], NAMES, tmp_path / "a.png")
    assert titles(figures[2]) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [("x" * 17 + "$y", "x" * 17 + "$"), ("$" * 30, "$" * 18), ("_", "_"), ("日本", "日本")],
)
def test_names_above_a_batch_are_shortened_before_they_are_escaped(name, shown, figures, tmp_path):
    batch.draw_batch(images(1), torch.tensor([[1.0]]), [name], "$batch", tmp_path / "a.png")
    assert titles(figures[0]) == [shown]
    assert seen(figures[0].get_suptitle()) == "$batch"


def test_a_batch_has_a_cell_for_each_image(figures, tmp_path):
    shares = torch.eye(3)[torch.arange(11) % 3]
    batch.draw_batch(images(11, 1), shares, ["a", "b", "c"], "t", tmp_path / "a.png")
    assert titles(figures[0]) == ["abc"[i % 3] for i in range(11)]
    assert len(figures[0].axes) == 2 * batch.COLUMNS


def test_the_matrix_and_mistakes_have_names_as_they_are(figures, tmp_path):
    outputs, labels = torch.eye(5).roll(1, 0), torch.arange(5)
    classification.confusion_matrix(outputs, labels, NAMES, tmp_path / "a.png")
    [axes] = figures[0].axes
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [seen(tick.get_text()) for tick in ticks] == NAMES
    assert axes.get_title() == "0.00% of 5 test images are right"
    counts = {t.get_position(): t.get_text() for t in axes.texts}
    assert counts == {((i - 1) % 5, i): "1" for i in range(5)}
    classification.mistakes(images(2), 50 * outputs[:2], labels[:2], NAMES, tmp_path / "a.png")
    assert titles(figures[1]) == [
        "𝔞\\$ (100%)\nis _background_",
        "_background_ (100%)\nis $a$ & $b",
    ]


def test_a_matrix_of_one_class_and_of_no_images_is_drawn(figures, tmp_path):
    zero = torch.zeros(3, dtype=torch.int64)
    classification.confusion_matrix(torch.zeros(3, 1), zero, ["$"], tmp_path / "a.png")
    assert figures[0].axes[0].get_title() == "100.00% of 3 test images are right"
    classification.confusion_matrix(torch.zeros(0, 2), zero[:0], ["a", "b"], tmp_path / "a.png")
    assert len(figures[1].axes[0].texts) == 0


def test_a_trace_names_its_three_likeliest_classes(figures, tmp_path):
    shares = torch.tensor([0.3, 0.05, 0.25, 0.2, 0.2]).repeat(4, 2, 1)
    shares[-1, 1] = torch.tensor([0.0, 0.9, 0.1, 0.0, 0.0])
    recursion.recursion_trace(
        *((shares, torch.full((4, 2), 0.5)), images(2), torch.tensor([0, 1]), NAMES),
        tmp_path / "a.png",
        latent_steps=None,
        recursion_steps=3,
    )
    first, second = legends(figures[0])
    assert first[0] == "_background_"
    assert {*first[1:-1]} <= {*NAMES[2:]}
    assert second[:2] == ["$a$ & $b", "_background_"]
    assert first[-1] == second[-1] == "halting"
    shown = [axes for axes in figures[0].axes if axes.get_legend()]
    np.testing.assert_allclose(shown[1].get_lines()[2].get_ydata(), shares[:, 1, 1])
    assert "is $a$ & $b" in [seen(axes.get_ylabel()) for axes in figures[0].axes]


@pytest.mark.parametrize("count", [1, 5, 6, 11, 23])
def test_every_model_has_a_line_of_its_own_under_corruption(count, figures):
    models = [f"_m{i}$" for i in range(count)]
    accuracies = {
        (name, severity): {m: 0.9 - 0.01 * i - 0.1 * severity for i, m in enumerate(models)}
        for name, severity in (("clean", 0), ("fog", 1), ("fog", 5), ("snow", 3))
    }
    assert corruptions.draw_corruptions(accuracies).startswith(b"\x89PNG")
    [legend] = legends(figures[0])
    assert legend == models
    assert titles(figures[0]) == ["fog", "snow"]
    fog, snow = (axes.get_lines() for axes in figures[0].axes)
    looks = {(line.get_color(), line.get_linestyle()) for line in fog}
    assert len(looks) == min(count, 20)
    for i, line in enumerate(fog):
        assert [*line.get_xdata()] == [0, 1, 5]
        np.testing.assert_allclose(line.get_ydata(), 0.9 - 0.01 * i - np.array([0, 0.1, 0.5]))
    assert [*snow[0].get_xdata()] == [0, 3]


def test_clean_images_alone_are_an_empty_picture(figures):
    assert corruptions.draw_corruptions({("clean", 0): {"a": 1.0}}).startswith(b"\x89PNG")
    assert titles(figures[0]) == []


def row(epoch, loss, **more):
    return {
        **{"epoch": epoch, "train_loss": loss, "test_loss": loss / 2, "learning_rate": 0.1},
        **more,
    }


@pytest.mark.parametrize(
    ("losses", "scale"),
    [((2.0, 1.0), "log"), ((0.0, 0.0), "linear"), ((1.0, 0.0), "log"), ((np.nan, 1.0), "log")],
)
def test_losses_are_on_a_logarithmic_axis_where_one_is_above_zero(losses, scale, figures, tmp_path):
    history = [row(i, loss) for i, loss in enumerate(losses, 1)]
    curves.learning_curves(history, tmp_path / "a.png")
    assert titles(figures[0]) == ["loss", "learning rate"]
    loss, rate = figures[0].axes
    assert (loss.get_yscale(), rate.get_yscale()) == (scale, "linear")
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), losses)
    assert legends(figures[0]) == [["train, augmented", "test"]]


def test_curves_are_those_of_the_split_that_was_held_out(figures, tmp_path):
    more = {"validation_loss": 3.0, "train_accuracy": 0.5, "validation_accuracy": 0.25}
    curves.learning_curves([row(1, 1.0, **more)], tmp_path / "a.png")
    assert titles(figures[0]) == ["loss", "accuracy, %", "learning rate"]
    assert legends(figures[0]) == [["train, augmented", "validation"]] * 2
    accuracy = figures[0].axes[1].lines
    assert [line.get_ydata()[0] for line in accuracy] == [50, 25]
    assert accuracy[0].get_marker() == "o"  # a single point
