"""Data sets in memory: pixel statistics, fingerprints, and other classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smallfry.data.image_data import ImageData
from smallfry.data.splits import Split, hold_out, take_some
from smallfry.errors import SmallfryWarning


def split(count=6, channels=3, classes=3, seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, size, size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.arange(count), torch.arange(count) % classes)


def data(channels=3, classes=("ant", "bee", "cat"), **given):
    parts = [split(n, channels, len(classes), seed) for seed, n in enumerate((6, 3, 3))]
    locate = {name: f"{name}/{{}}.png".format for name in ("train", "validation", "test")}
    made = ImageData("set", "the set", tuple(classes), 4, channels, *parts, _locate=locate)
    return replace(made, **given)


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_deviation_are_those_of_the_training_pixels(channels):
    found = data(channels)
    pixels = found.train.images.double() / 255
    assert found.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert found.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())
    assert len(found.mean) == channels


def test_only_rows_of_the_split_count():
    whole = data()
    few = replace(whole, train=whole.train.take(torch.tensor([2])))
    pixels = whole.train.images[2].double() / 255
    assert few.mean == pytest.approx(pixels.mean((1, 2)).tolist())


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_channel_has_a_deviation_to_divide_by(value):
    one = Split(torch.full((2, 1, 4, 4), value, dtype=torch.uint8), torch.arange(2), torch.zeros(2))
    found = replace(data(1), train=one)
    assert found.mean == pytest.approx((value / 255,))
    assert found.std == (1e-3,)


def test_stated_moments_win():
    moments = ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    found = data(moments=moments)
    assert (found.mean, found.std) == moments


def test_a_fingerprint_is_that_of_images_labels_and_names():
    one = data()
    assert one.fingerprint == data().fingerprint
    assert one.fingerprint == replace(one, name="other", origin="elsewhere").fingerprint
    assert len(one.fingerprint) == 16
    moved = replace(one.train, rows=one.train.rows.flip(0))
    label = replace(one.train, labels=one.train.labels.flip(0))
    others = [
        replace(one, classes=("ant", "bee", "cow")),
        replace(one, train=moved),
        replace(one, train=label),
        replace(one, validation=one.validation.take(torch.tensor([0, 1]))),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5
    # the test split is no part of a training
    assert one.fingerprint == replace(one, _held_out=split(1)).fingerprint


def test_a_fingerprint_of_the_sources_spelling_is_known_too():
    one = data()
    spelled = data(_spelled=("ant", "bee", "c\udce4t"))
    before = data(classes=("ant", "bee", "c\udce4t")).fingerprint
    assert before != one.fingerprint
    assert spelled.matches(before)
    assert spelled.matches(one.fingerprint)
    assert not one.matches(before)
    assert not data(_spelled=one.classes).matches("0" * 16)


def test_names_without_a_character_of_unicode_have_a_fingerprint():
    assert len(data(classes=("a", "b", "\udcff")).fingerprint) == 16


def test_the_same_classes_change_nothing():
    one = data()
    assert one.relabelled(one.classes) is one
    assert one.relabelled(("x", "y")) is one


def test_labels_follow_their_names():
    one = data()
    other = one.relabelled(("cat", "dog", "ant", "bee"))
    assert other.classes == ("cat", "dog", "ant", "bee")
    for before, after in ((one.train, other.train), (one.test, other.test)):
        names = [one.classes[label] for label in before.labels]
        assert [other.classes[label] for label in after.labels] == names
        assert torch.equal(before.images, after.images)


def test_images_of_other_classes_are_left_out_and_named():
    one = data()
    with pytest.warns(SmallfryWarning, match="the set: skipped images of bee, which the model"):
        other = one.relabelled(("cat", "ant"))
    assert len(other.train) == 4
    assert set(other.train.labels.tolist()) == {0, 1}
    assert [len(part) for part in (other.train, other.validation, other.test)] == [4, 2, 2]
    assert other.test_count == 2


def test_duplicates_are_left_out_of_training_and_validation():
    one = data()
    shared = torch.cat([one.train.images, one.test.images[:1], one.train.images[1:2]])
    labels = torch.cat([one.train.labels, one.test.labels[:1], torch.tensor([2])])
    doubled = replace(one, train=Split(shared, torch.arange(len(shared)), labels))
    sentences = doubled.duplicates()
    assert any("1 of 3 test images are in the train split too" in each for each in sentences)
    assert any("1 images have several labels" in each for each in sentences)
    found = doubled.without_duplicates()
    assert len(found.train) == 5  # neither the shared image nor the ambiguous pair
    assert found.duplicates() == []
    assert len(found.test) == 3


def test_generated_data_is_not_compared():
    same = replace(data(), train=split(), validation=split(), generated={"puzzles": 6})
    assert same.duplicates() == []


# Splits


LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def labelled(labels):
    count = len(labels)
    return Split(torch.zeros(count, 1, 1, 1), torch.arange(count) + 100, torch.tensor(labels))


@settings(deadline=None)
@given(LABELS, st.floats(0, 0.9), st.integers(0, 5))
def test_held_out_images_are_a_share_of_every_class(labels, share, seed):
    whole = labelled(labels)
    kept, held = hold_out(whole, share, seed)
    assert sorted([*kept.rows.tolist(), *held.rows.tolist()]) == whole.rows.tolist()
    assert kept.rows.tolist() == sorted(kept.rows.tolist())
    for label in set(labels):
        have, count = labels.count(label), int((held.labels == label).sum())
        assert have - count >= 1
        if share and have > 1:
            assert count >= 1
        assert abs(count - share * have) <= 1
    again = hold_out(whole, share, seed)
    assert torch.equal(again[1].rows, held.rows)


@settings(deadline=None)
@given(LABELS, st.integers(0, 70), st.integers(0, 5))
def test_some_images_are_of_all_classes_if_they_can(labels, count, seed):
    whole = labelled(labels)
    found = take_some(whole, count, seed)
    assert len(found) == min(count, len(labels))
    assert len(set(found.rows.tolist())) == len(found)
    assert set(found.rows.tolist()) <= set(whole.rows.tolist())
    classes = set(labels)
    if count >= len(classes):
        assert set(found.labels.tolist()) == classes
    for label in classes:
        share = count * labels.count(label) / len(labels)
        assert int((found.labels == label).sum()) <= max(1, share + len(classes))


def test_another_seed_takes_other_images():
    whole = labelled([0, 1] * 20)
    first, second = (hold_out(whole, 0.3, seed)[1].rows for seed in (0, 1))
    assert not torch.equal(first, second)
    first, second = (take_some(whole, 10, seed).rows for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("empty", [hold_out, take_some])
def test_nothing_divides_into_nothing(empty):
    none = Split(torch.zeros(0, 1, 1, 1), torch.arange(0), torch.zeros(0, dtype=torch.int64))
    found = empty(none, 0 if empty is take_some else 0.5, 0)
    assert all(len(part) == 0 for part in (found if isinstance(found, tuple) else (found,)))


def test_a_split_is_a_view_that_is_read_when_it_is_indexed():
    whole = split()
    some = whole.take(torch.tensor([4, 0, 4]))
    assert some.pixels is whole.pixels
    assert some.labels.tolist() == [1, 0, 1]
    assert torch.equal(some.images, whole.pixels[[4, 0, 4]])
    table = np.array([-1, 5, 3])
    assert some.relabelled(table).labels.tolist() == [5, 5]
    order = whole.shuffled(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(6))
