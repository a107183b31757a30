import hashlib

import numpy as np
import pytest

from smallfry.data import load_data
from smallfry.data.cache import decoded
from smallfry.data.curves import COUNTS, draw, read_curves, three_points
from smallfry.data.sources import TEST, TRAIN, EncodedSplit
from smallfry.errors import UsageError


def images(split: EncodedSplit, rows) -> np.ndarray:
    return np.stack([split.read(i) for i in rows])


@pytest.fixture(scope="module")
def train():
    return read_curves().splits[TRAIN]


def test_there_are_as_many_curves_as_in_the_paper():
    source = read_curves()
    assert source.classes == ("curve",)
    assert {split: len(found.labels) for split, found in source.splits.items()} == COUNTS
    assert COUNTS == {TRAIN: 20_000, TEST: 10_000}


def test_values_span_all_levels_and_edges_are_soft(train):
    found = images(train, range(200))
    assert (found.shape, found.dtype) == ((200, 1, 28, 28), np.uint8)
    assert (found.min(), found.max()) == (0, 255)
    assert ((found > 0) & (found < 255)).any((1, 2, 3)).all()
    assert len(np.unique(found)) == 256


def test_the_three_points_are_on_the_curve(train):
    for i in range(200):
        column, row = np.floor(three_points(0, 0, i)).astype(int).T
        # the centre of a point's pixel is at most √½ away: exp(-0.5 / (2 · 0.58²)) = 0.47
        assert (train.read(i)[0, row, column] >= 0.47 * 255).all()


def test_a_pixel_fades_with_its_distance_to_the_curve():
    across = draw(np.array([[4.0, 14.5], [14.0, 14.5], [24.0, 14.5]]))[0]
    distance = np.abs(np.arange(28) - 14)
    assert across[:, 14].tolist() == np.rint(255 * np.exp(-(distance**2) / 0.6728)).tolist()
    assert (across[14, 4:24] == 255).all()
    assert across[14, 0] == 0


def test_a_curve_passes_its_points_in_their_order():
    bent = draw(np.array([[4.5, 4.5], [14.5, 24.5], [24.5, 4.5]]))[0]
    assert bent[4, 4] == bent[4, 24] == bent[24, 14] == 255
    assert bent[4, 14] == 0


def test_three_equal_points_make_a_dot():
    dot = draw(np.full((3, 2), 14.5))[0]
    assert dot[14, 14] == 255
    assert dot[14, 16] == dot[16, 14] == 1


def test_an_image_does_not_depend_on_which_others_are_read(train):
    alone = read_curves().splits[TRAIN].read(777)
    assert np.array_equal(images(train, [5, 777, 3])[1], alone)
    assert np.array_equal(images(train, range(770, 780))[7], alone)


def test_streams_and_seeds_differ():
    source, other = read_curves(), read_curves(seed=1)
    first = [images(s, range(20)) for s in (*source.splits.values(), *other.splits.values())]
    assert len({part.tobytes() for part in first}) == 4
    prints = [s.fingerprint for s in (*source.splits.values(), *other.splits.values())]
    assert len(set(prints)) == 4


def test_the_same_seed_draws_the_same_images_everywhere():
    """On any machine: NumPy fixes Philox's stream, and no level hangs on the last bits of ``exp``.

    Rounding could tell two of them apart only within 1e-12 of a half; here all keep off it by 3e-5.
    """
    splits = read_curves().splits
    found = b"".join(images(splits[split], range(8)).tobytes() for split in (TRAIN, TEST))
    assert hashlib.sha256(found).hexdigest()[:16] == "7fc3b2caea0053f3"


def test_the_amount_of_ink_is_that_of_the_published_curves(train):
    """A code of nothing but the mean image costs 0.158 nats a pixel in the published logs."""
    mean = images(train, range(2000)).mean((0, 1)) / 255
    p = mean.clip(1e-9, 1 - 1e-9)
    assert -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean() == pytest.approx(0.158, abs=0.006)


def test_load_data_holds_out_a_share_of_the_only_class(monkeypatch):
    monkeypatch.setattr("smallfry.data.curves.COUNTS", {TRAIN: 50, TEST: 20})
    monkeypatch.setattr("smallfry.data.curves.RECIPE", "few")  # not to be kept as all
    data = load_data("curves", validation=0.2, min_classes=1)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 10, 20]
    assert (data.image_size, data.channels, data.classes) == (28, 1, ("curve",))
    few = load_data("curves", validation=0.2, min_classes=1, limit=7)
    assert len(few.train) == 7
    kept, unreadable, _ = decoded(read_curves().splits[TRAIN], 28, 1)
    assert not unreadable
    assert np.array_equal(data.train.images.numpy(), kept[data.train.rows])


def test_curves_are_refused_where_classes_are_wanted():
    with pytest.raises(UsageError, match=r"curves has no classes to distinguish.*min_classes=1"):
        load_data("curves")
    with pytest.raises(UsageError, match=r"curves is generated and does not use data\.root"):
        load_data("curves", ".", min_classes=1)
