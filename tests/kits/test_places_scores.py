"""Patch normalisation, scores of places, recall and precision, baselines, and traverses."""

import numpy as np
import pytest

from smallfry.errors import UsageError
from smallfry.kits.places.images import firing_rates, patch_normalise
from smallfry.kits.places.scores import (
    absolute_difference,
    place_scores,
    precision_recall,
    recall_at,
    ridge,
)
from smallfry.kits.places.traverse import TraverseSettings, draw_traverse, fractal
from smallfry_runtime.decoders import decoder_of
from smallfry_runtime.errors import UsageError as RuntimeUsageError

I = np.arange(144.0)  # noqa: E741
IMAGE = np.floor(127 + 100 * np.sin(0.37 * I) * np.cos(0.011 * I**2)).reshape(12, 12)
ROW_0 = [
    *(-0.199915993, 0.360307919, 0.845239279, 1.0, 1.0, 1.0, 1.0, 0.426518621, -0.131270045),
    *(-0.585719114, -0.856194708, -0.711560623),
]
ROW_6 = [
    *(1.0, -0.662757224, -1.0, 0.548006844, 0.293007832, 0.345176505, 0.610709805, -1.0),
    *(-0.700363669, 1.0, -0.132004319, -1.0),
]


def test_patches_are_normalised_as_the_authors():
    found = patch_normalise(IMAGE)
    assert found[0] == pytest.approx(ROW_0, abs=1e-9)
    assert found[6] == pytest.approx(ROW_6, abs=1e-9)
    assert found.sum() == pytest.approx(2.445964378, abs=1e-8)
    rates = firing_rates(IMAGE)
    assert (4 * rates[:12]).tolist() == [102, 173, 235, 255, 255, 255, 255, 181, 110, 52, 18, 36]
    assert 4 * rates.sum() == 18622
    assert 0 <= rates.min() <= rates.max() <= 63.75


@pytest.mark.parametrize("shape", [(9, 9), (5, 11), (3, 4)])
def test_patches_are_those_of_a_loop(shape):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(float)
    images[1, :, :3] = 7.0  # constant neighbourhoods
    wanted = np.zeros_like(images)
    for n, image in enumerate(images):
        for row, column in np.ndindex(*shape):
            top, left = max(0, row - 3), max(0, column - 3)
            patch = image[top : row + 4, left : column + 4]
            if patch.std() > 0:
                wanted[n, row, column] = (image[row, column] - patch.mean()) / patch.std()
    assert patch_normalise(images) == pytest.approx(np.clip(wanted, -1, 1), abs=1e-9)


ASSIGNMENT = np.array([0, 0, 1, 2, -1, 1])
RESPONSES = np.array([[3, 0, 1, 5, 2, 0], [0, 0, 0, 0, 0, 0], [1, 2, 4, 0, 0, 2]])
ACTIVE = np.array([4, 12, 3, 30, 1, 9])


@pytest.mark.parametrize(
    ("threshold", "wanted"),
    [
        (None, [[1.5, 0.5, 5.0], [0, 0, 0], [1.5, 3.0, 0]]),
        (10, [[1.5, 0.5, 0], [0, 0, 0], [0.5, 3.0, 0]]),
        (5, [[1.5, 0.5, 0], [0, 0, 0], [0.5, 2.0, 0]]),
    ],
)
def test_silenced_neurons_count_nothing_and_still_divide(threshold, wanted):
    silenced = None if threshold is None else threshold <= ACTIVE
    assert place_scores(RESPONSES, ASSIGNMENT, 3, silenced).tolist() == wanted
    assert place_scores(RESPONSES, ASSIGNMENT, 5)[:, 3:].sum() == 0


def test_recall_counts_places_among_the_best_and_no_match_as_wrong():
    scores = np.array([[0.0, 2, 1], [0, 0, 0], [1, 1, 3], [4, 1, 0]])
    truth = np.array([1, 0, 1, 2])
    assert recall_at(scores, truth) == 0.25
    assert recall_at(scores, truth, 2) == 0.25  # of equal scores the lower place
    assert recall_at(scores, truth, 3) == 0.5  # what scores nothing is no match
    assert recall_at(scores, truth, tolerance=1) == 0.5
    assert recall_at(scores[:0], truth[:0]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_precision_and_recall_are_those_of_every_threshold(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 6, (40, 4)).astype(float)
    truth = random.integers(0, 4, 40)
    curve = precision_recall(scores, truth)
    best, confidence = scores.argmax(axis=1), scores.max(axis=1)
    wanted = []
    for threshold in sorted({*confidence.tolist()} - {0.0}, reverse=True):
        taken = confidence >= threshold
        hits = (taken & (best == truth)).sum()
        wanted.append((hits / 40, hits / taken.sum()))
    found = np.stack([curve.recall, curve.precision], axis=1)
    assert found == pytest.approx(np.array(wanted))
    before, area = 0.0, 0.0
    for recall, precision in wanted:
        area, before = area + (recall - before) * precision, recall
    assert curve.area == pytest.approx(area)


def test_recall_at_full_precision_and_of_nothing():
    scores = np.array([[0, 4.0], [3, 0], [0, 2], [1, 0]])
    curve = precision_recall(scores, np.array([1, 0, 0, 0]))
    assert curve.recall_at_full_precision == 0.5
    assert precision_recall(np.zeros((2, 3)), np.array([0, 1])).recall_at_full_precision == 0
    assert precision_recall(scores[:1], np.array([0])).recall_at_full_precision == 0


def test_baselines_find_the_images_they_know():
    random = np.random.default_rng(0)
    references = random.uniform(-1, 1, (2, 6, 50))
    queries = references[1, [3, 0]] + random.normal(0, 0.05, (2, 50))
    for scores in (absolute_difference(references, queries), ridge(references, queries)):
        assert scores.shape == (2, 6)
        assert scores.argmax(axis=1).tolist() == [3, 0]
    far = min(np.abs(queries[0] - references[t, 2]).mean() for t in range(2))
    assert absolute_difference(references, queries)[0, 2] == pytest.approx(2 - far)


def test_ridge_is_the_least_squares_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    random = np.random.default_rng(1)
    references, queries = random.normal(size=(3, 5, 20)), random.normal(size=(4, 20))
    wanted = linear.Ridge(alpha=2.0).fit(references.reshape(15, 20), np.tile(np.eye(5), (3, 1)))
    assert ridge(references, queries, 2.0) == pytest.approx(wanted.predict(queries), abs=1e-9)


def test_traverses_are_functions_of_seed_and_number():
    settings = TraverseSettings(places=6, calibration=2)
    drawn = [draw_traverse(settings, number) for number in range(3)]
    assert drawn[0].shape == (6, 16, 16)
    assert drawn[0].tobytes() == draw_traverse(settings, 0).tobytes()
    every = {image.tobytes() for traverse in drawn for image in traverse}
    assert len(every) == 18
    other = draw_traverse(TraverseSettings(places=6, calibration=2, seed=1), 0)
    assert other.tobytes() != drawn[0].tobytes()
    known = patch_normalise(np.stack(drawn[:2])).reshape(2, 6, -1)
    asked = patch_normalise(drawn[2]).reshape(6, -1)
    assert recall_at(absolute_difference(known, asked), np.arange(6)) >= 0.8


def test_queries_have_weather_and_routes_repeat_themselves():
    plain = TraverseSettings(places=6, calibration=2)
    for changes in ({"night": True}, {"rain": True}):
        other = TraverseSettings(places=6, calibration=2, **changes)
        assert (draw_traverse(other, 1) == draw_traverse(plain, 1)).all()
        assert (draw_traverse(other, 2) != draw_traverse(plain, 2)).any()
    dark = draw_traverse(TraverseSettings(places=6, calibration=2, night=True), 2)
    assert dark.mean() < 0.7 * draw_traverse(plain, 2).mean()
    aliased = TraverseSettings(places=8, calibration=2, aliased=3, shift=0)
    values = patch_normalise(draw_traverse(aliased, 0)).reshape(8, -1)
    same, others = np.abs(values[0] - values[5]).mean(), np.abs(values[0] - values[3]).mean()
    assert same < 0.8 * others


def test_fractal_noise_has_no_frequency_below_the_lowest():
    noise = fractal(np.random.default_rng(0), 32, 96, 1.6, 1 / 24)
    assert noise.std() == pytest.approx(1)
    power = np.abs(np.fft.rfft2(noise)) ** 2
    rates = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(96)[None])
    assert power[rates < 1 / 24].max() < 1e-15 * power.max()
    low, high = power[(rates > 0.05) & (rates < 0.1)].mean(), power[rates > 0.3].mean()
    assert low > 10 * high


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"places": 1}, "places is 2 to 100,000, got 1"),
        ({"calibration": 80}, "calibration is 1 to 79, got 80"),
        ({"side": 64}, "side is 4 to 48, got 64"),
        ({"shift": 9}, "shift is 0 to 6, got 9"),
    ],
)
def test_wrong_settings_of_traverses_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        TraverseSettings(**settings)


def test_places_are_decoded_with_the_best_five():
    decoder = decoder_of("places")
    scores = np.array([[0, 1.5, 3, 0.5, 1, 2, 0.25], [0.0] * 7])
    first, second = decoder.decode(scores, [*"abcdefg"])
    assert first == {
        "place": "c",
        "score": 3.0,
        "best": {"c": 3.0, "f": 2.0, "b": 1.5, "e": 1.0, "d": 0.5},
    }
    assert second == {"place": None, "score": 0.0, "best": {}}
    assert decoder.right(scores, np.array([2, 0])).tolist() == [True, False]
    with pytest.raises(RuntimeUsageError, match="no setting 'beam'"):
        decoder.decode(scores, [*"abcdefg"], {"beam": 1})
