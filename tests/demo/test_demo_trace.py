"""What the page tells of a model's thinking is what the model thinks."""

from io import BytesIO

import numpy as np
import pytest
import torch
from demo_runs import TINY, untrained
from html_view import View
from markupsafe import escape
from PIL import Image

from smallfry.demo.trace import moments_of, think
from smallfry.demo.view import (
    PICTURE,
    classes_to_show,
    show_error,
    show_moment,
    show_status,
)
from smallfry.training.inference import classify
from smallfry.training.run import load_run
from smallfry_runtime.images import decode
from smallfry_runtime.inputs import InputImage

NASTY = ("<script>alert(1)</script>", 'a"b', "c & d", "$e$", "f", "g", "h")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (1, 8, 8), dtype=np.uint8)


@pytest.fixture
def thinker(tmp_path):
    return lambda **options: load_run(untrained(tmp_path / "model", **options))


def encoded(pixels):
    file = BytesIO()
    Image.fromarray(pixels[0]).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("recursion_steps", [1, 3])
def test_the_answer_is_that_of_predict(thinker, pixels, recursion_steps):
    trained = thinker(**TINY, recursion_steps=recursion_steps)
    trace = think(trained, decode(encoded(pixels), "it", 8, 1))
    answer = trace.moments[trace.answer]
    [said] = classify(trained, [InputImage("it", encoded(pixels))], top_k=10)
    assert {trained.classes[i]: p for i, p in enumerate(answer.probabilities)} == pytest.approx(
        dict(said.top), abs=1e-6
    )
    assert answer.halting == pytest.approx(said.halting, abs=1e-6)


def test_every_latent_step_has_its_moment(thinker, pixels):
    trained = thinker(**TINY, recursion_steps=3)
    trace = think(trained, pixels)
    places = [(moment.recursion, moment.latent_step) for moment in trace.moments]
    assert places == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert len(places) == moments_of(trained.model)
    steps = trained.model.recurse(trained.normalize(torch.from_numpy(pixels[None])))
    for moment, step in zip(trace.moments[2::2], steps, strict=True):
        wanted = step.logits[0].softmax(0).tolist()
        assert moment.probabilities == pytest.approx(wanted, abs=1e-6)
    assert len({moment.probabilities for moment in trace.moments}) == 7


def test_a_model_of_one_recursion_step_is_followed_beyond_it(thinker, pixels):
    trace = think(thinker(**TINY), pixels)
    assert (trace.answer, len(trace.moments)) == (2, 5)
    assert "beyond its training" in show_moment(trace, 3, list("0123456789"))
    assert "the model’s answer" in show_moment(trace, 2, list("0123456789"))


@pytest.mark.parametrize("cross_attention", [False, True])
def test_attention_is_a_square_of_shares_from_the_first_look_on(thinker, pixels, cross_attention):
    trained = thinker(**TINY, patch_size=2, cross_attention=cross_attention)
    first, *others = think(trained, pixels).moments
    assert first.attention is None
    for moment in others:
        assert moment.attention.patches.shape == (4, 4)
        assert moment.attention.patches.sum() == pytest.approx(1)
        assert 0 < moment.attention.share < 1


def test_attention_counts_from_the_start_of_each_recursion_step(thinker, pixels):
    moments = think(thinker(**TINY | {"latent_steps": 3}), pixels).moments[1:]
    shares = [moment.attention.share for moment in moments]
    assert shares[0] < shares[1] < shares[2]  # half of what is not the image yet becomes it
    assert shares[3] < shares[2]


def test_a_model_whose_attention_says_nothing_says_why(thinker, pixels):
    trace = think(thinker(name="vitrm_plus_micro_8"), pixels)
    assert all(moment.attention is None for moment in trace.moments)
    assert escape(trace.no_attention) in show_moment(trace, 1, list("0123456789"))


def test_a_model_that_does_not_recur_has_one_moment(thinker):
    trained = thinker(name="resnet18_cifar", size=32, channels=3)
    trace = think(trained, np.zeros((3, 32, 32), dtype=np.uint8), runs=2)
    [moment] = trace.moments
    assert (moment.halting, moment.attention, trace.answer) == (None, None, 0)
    assert sum(moment.probabilities) == pytest.approx(1)
    assert moment.milliseconds > 0
    assert "<svg" not in show_moment(trace, 0, list("0123456789"))


def test_time_grows_with_every_recursion_step_and_says_how_it_was_taken(thinker, pixels):
    trace = think(thinker(**TINY, recursion_steps=4), pixels, runs=3)
    first, *times = [moment.milliseconds for moment in trace.moments[::2]]
    assert first is None
    assert 0 < times[0] < times[1] < times[2] < times[3]
    assert trace.timing == (3, "CPU", 1)
    shown = show_moment(trace, 4, list("0123456789"))
    assert f"{times[1]:.1f} ms" in shown
    assert "median of 3 runs on the CPU with 1 thread" in shown


# How it looks


def test_class_names_are_escaped(thinker, pixels):
    trace = think(thinker(**TINY, classes=NASTY), pixels)
    for moment in range(len(trace.moments)):
        shown = show_moment(trace, moment, NASTY)
        assert "<script" not in shown
        assert 'a"b' not in shown
    view = View(show_moment(trace, 0, [NASTY[0]] * 7))
    assert view.texts.count(NASTY[0]) == 5
    [drawing] = view.of("svg")
    assert drawing["aria-label"].startswith(f"Probabilities of {', '.join([NASTY[0]] * 5)}, and")
    assert View(show_error(NASTY[0])).texts == View(show_status(NASTY[0])).texts == [NASTY[0]]


def test_the_curve_has_a_line_and_a_mark_of_each_class_and_of_halting(thinker, pixels):
    trace = think(thinker(**TINY, recursion_steps=3), pixels)
    view = View(show_moment(trace, 2, list("0123456789"), PICTURE))
    styles = [group["style"] for group in view.of("g")]
    assert styles == [
        f"--line: var({c})" for c in ("--c4", "--c3", "--c2", "--c1", "--c0", "--halt")
    ]
    first = classes_to_show(trace)[0]
    points = [point.split(",") for point in view.of("polyline")[4]["points"].split()]
    heights = [16 + 148 * (1 - moment.probabilities[first]) for moment in trace.moments]
    assert [float(y) for _, y in points] == pytest.approx(heights, abs=0.051)
    assert [float(x) for x, _ in points] == pytest.approx(
        [58 + 494 * i / 6 for i in range(7)], abs=0.051
    )
    assert view.of("circle")[4] == {"cx": points[2][0], "cy": points[2][1], "r": "4"}
    assert [line.get("stroke-dasharray") for line in view.of("polyline")] == [None] * 5 + ["5 4"]
    assert [text for text in view.texts if text.startswith("recursion ")] == [
        *(f"recursion {step}" for step in (1, 2, 3))
    ]


def test_a_view_has_the_picture_with_attention_over_it(thinker, pixels):
    trace = think(thinker(**TINY), pixels)
    for moment, sources in ((0, [PICTURE]), (1, [PICTURE, PICTURE, None])):
        pictures = View(show_moment(trace, moment, list("0123456789"), PICTURE)).of("img")
        assert all(picture["class"] == "sf-pixels" for picture in pictures)
        assert len(pictures) == len(sources)
        for picture, source in zip(pictures, sources, strict=True):
            assert picture["src"] == source or picture["src"].startswith("data:image/png;base64,")
    patches = trace.moments[1].attention.patches
    row, column = np.unravel_index(patches.argmax(), patches.shape)
    assert f"strongest in row {row + 1}, column {column + 1} of" in pictures[-1]["alt"]


def test_the_classes_shown_stay_in_place_while_the_numbers_change(thinker, pixels):
    trace = think(thinker(**TINY), pixels)
    shown = classes_to_show(trace)
    answer = trace.moments[trace.answer].probabilities
    assert len(set(shown)) == 5
    assert max(range(10), key=lambda c: answer[c]) in shown
    assert [answer[c] for c in shown] == sorted((answer[c] for c in shown), reverse=True)


def test_a_model_of_two_classes_is_shown_whole(thinker, pixels):
    trace = think(thinker(**TINY, classes=("yes", "no")), pixels)
    assert sorted(classes_to_show(trace)) == [0, 1]
    assert "the other" not in show_moment(trace, 1, ("yes", "no"))
