"""Generated pairs: views agree by the true disparity, and occlusions are of a z-buffer."""

import numpy as np
import pytest
import torch

from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.kits.stereo.planes import (
    CLASSES,
    PlaneSettings,
    _layers,
    _random,
    draw_pair,
    is_test_disparity,
)
from smallfry.kits.stereo.truth import unpack

PLAIN = PlaneSettings(cameras=0.0, grain=0.0)


def differences(settings, number, moved=0.0):
    """Compare the left view with the right one at u − d, in deviations of the left one."""
    pair = draw_pair(settings, "train", number)
    height, width = pair.disparity.shape
    places = np.arange(width) - pair.disparity - moved
    low = np.floor(places).astype(int)
    share = (places - low)[..., None]
    rows = np.arange(height)[:, None]
    right = pair.right.transpose(1, 2, 0).astype(float)
    read = right[rows, low.clip(0, width - 1)] * (1 - share)
    read += right[rows, (low + 1).clip(0, width - 1)] * share
    left = pair.left.transpose(1, 2, 0)
    return np.abs(read - left).mean(axis=-1) / left.std(), pair.hidden


def mean_difference(settings, moved=0.0, count=10):
    found = [differences(settings, number, moved) for number in range(count)]
    seen = np.mean([values[~hidden].mean() for values, hidden in found])
    return seen, np.mean([values[hidden].mean() for values, hidden in found])


def test_the_right_view_shows_the_left_one_at_the_true_disparity():
    seen, hidden = mean_difference(PLAIN)
    assert seen < 0.06
    assert hidden > 0.4


@pytest.mark.parametrize("moved", [-0.5, 0.5, 1.0])
def test_a_disparity_that_is_off_fails_this(moved):
    assert mean_difference(PLAIN, moved)[0] > 1.4 * mean_difference(PLAIN)[0]


def test_occlusions_are_those_of_a_z_buffer():
    """The nearest layer at each right column hides all others there."""
    for number in range(4):
        settings = PlaneSettings()
        pair = draw_pair(settings, "train", number)
        height, width = pair.disparity.shape
        layers = _layers(settings, "train", _random(settings, "train", number), height, width)
        agreed, total = 0, 0
        for v in range(0, height, 7):
            for u in range(width):
                place = u - pair.disparity[v, u]
                if place < 0:
                    assert pair.hidden[v, u]
                    continue
                column = round(place)
                nearest = 0.0
                for layer in layers:
                    d = layer.disparity[v]
                    columns = np.full((height, width), column + d)
                    if layer.shape(columns)[v, 0]:
                        nearest = max(nearest, d)
                total += 1
                agreed += pair.hidden[v, u] == (abs(nearest - pair.disparity[v, u]) > 0.75)
        assert agreed == total


def test_a_pair_is_a_function_of_its_number_and_split():
    settings = PlaneSettings()
    one, again = (draw_pair(settings, "train", 3) for _ in range(2))
    for first, second in zip(one, again, strict=True):
        assert np.array_equal(first, second)
    for other in (draw_pair(settings, "test", 3), draw_pair(settings, "train", 4)):
        assert not np.array_equal(one.left, other.left)
        assert not np.array_equal(one.disparity, other.disparity)


def test_backgrounds_of_test_pairs_are_in_no_training_pair():
    for split in ("train", "test"):
        for number in range(12):
            pair = draw_pair(PlaneSettings(), split, number)
            back = pair.disparity[pair.labels == 0]
            if len(back):
                assert is_test_disparity(float(back[0])) == (split == "test")


def test_truth_is_in_range_and_has_all_classes():
    seen = set()
    for number in range(8):
        pair = draw_pair(PlaneSettings(objects=8), "train", number, (64, 96))
        assert pair.left.shape == pair.right.shape == (3, 64, 96)
        assert pair.disparity.min() >= 1
        assert pair.disparity.max() <= 28
        assert 0 < pair.hidden.mean() < 0.5
        seen |= {*np.unique(pair.labels).tolist()}
    assert seen == {0, 1, 2, 3}


def test_a_data_set_has_views_and_truth():
    data = load_data("stereo-planes", options={"pairs": 20}, validation=0.25, test=0.2)
    assert data.input_shape == (6, 64, 128)
    assert data.classes == CLASSES
    assert [len(each) for each in (data.train, data.validation, data.test)] == [12, 4, 4]
    truth = unpack(data.test.labels)
    pair = draw_pair(PlaneSettings(pairs=20), "test", 1)
    assert torch.equal(
        data.test.images[1], torch.from_numpy(np.concatenate([pair.left, pair.right]))
    )
    assert np.allclose(truth.disparity[1], pair.disparity, atol=1e-5)
    assert np.array_equal(truth.hidden[1], pair.hidden)
    assert np.array_equal(truth.labels[1], pair.labels)
    assert torch.allclose(truth.weights.sum(dim=1), torch.tensor(4.0))
    again = load_data("stereo-planes", options={"pairs": 20}, validation=0.25, test=0.2)
    assert again.fingerprint == data.fingerprint
    assert load_data("stereo-planes", options={"pairs": 20}, limit=5).train.labels.shape[0] == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"pairs": 2}}, "pairs is 10 to 1,000,000, got 2"),
        ({"options": {"objects": 1}}, "objects is 2 to 100, got 1"),
        ({"options": {"grain": 2.0}}, "grain is 0 to 1"),
        ({"options": {"plane": 2}}, "data.options has no 'plane'"),
        ({"root": "x"}, "is generated and does not use data.root"),
        ({"image_size": (60, 128)}, "has sides of multiples of 32"),
        ({"label": "x"}, "stereo-planes has no data.label"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        load_data("stereo-planes", **settings)
