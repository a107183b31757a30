"""Identical images in several splits or under several labels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from smallfry.data import load_data
from smallfry.data.duplicates import (
    Hashed,
    describe_duplicates,
    image_hashes,
    kept_without_duplicates,
)
from smallfry.errors import SmallfryWarning, UsageError


def save(file, number):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def photos(tmp_path):
    """Training images 0 to 19, validation 20 to 23, test 30 to 33; cats are even."""
    for split, numbers in {
        "train": range(20),
        "val": range(20, 24),
        "test": range(30, 34),
    }.items():
        for i in numbers:
            save(tmp_path / split / ("cat", "dog")[i % 2] / f"{i}.png", i)
    return tmp_path


def numbers(split, of=40):
    known = {
        np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8).tobytes(): i
        for i in range(of)
    }
    return [known[image.numpy().transpose(1, 2, 0).tobytes()] for image in split.images]


def test_data_without_duplicates_has_nothing_told_and_nothing_left_out(photos):
    data = load_data(str(photos))
    assert data.duplicates() == []
    same = load_data(str(photos), remove_duplicates=True)
    assert same.fingerprint == data.fingerprint
    assert torch.equal(same.test.images, data.test.images)


def test_images_in_two_splits_are_counted_named_and_left_out_on_request(photos):
    save(photos / "test" / "cat" / "copy.png", 4)
    save(photos / "test" / "dog" / "copy.png", 21)
    save(photos / "val" / "cat" / "copy.png", 6)
    data = load_data(str(photos))
    told = data.duplicates()
    assert len(told) == 3
    assert "1 of 5 validation images are in the train split too" in told[0]
    assert "val/cat/copy.png, the same as" in told[0]
    assert "train/cat/6.png; --data.remove_duplicates true" in told[0]
    assert "1 of 6 test images are in the train split too" in told[1]
    assert "1 of 6 test images are in the validation split too" in told[2]
    clean = load_data(str(photos), remove_duplicates=True)
    assert sorted(numbers(clean.train)) == [i for i in range(20) if i not in (4, 6)]
    assert sorted(numbers(clean.validation)) == [6, 20, 22, 23]
    assert sorted(numbers(clean.test)) == [4, 21, *range(30, 34)]
    assert clean.duplicates() == []
    assert clean.fingerprint != data.fingerprint


def test_one_image_under_two_labels_is_named_and_left_out_on_request(photos):
    save(photos / "train" / "dog" / "copy.png", 4)
    (told,) = load_data(str(photos)).duplicates()
    assert "1 images have several labels, such as" in told
    assert "4.png (cat) and" in told
    assert "copy.png (dog)" in told
    clean = load_data(str(photos), remove_duplicates=True)
    assert 4 not in numbers(clean.train)
    assert len(clean.train) == 19
    assert clean.duplicates() == []


def test_copies_in_one_class_of_training_stay(photos):
    save(photos / "train" / "cat" / "copy.png", 4)
    assert load_data(str(photos)).duplicates() == []
    assert len(load_data(str(photos), remove_duplicates=True).train) == 21


def test_what_is_held_out_and_limited_is_compared_too(tmp_path):
    for name in ("cat", "dog"):
        for i in range(20):
            save(tmp_path / name / f"{i}.png", i // 2 + 100 * (name == "dog"))
    for limit in (None, 20):
        told = load_data(str(tmp_path), limit=limit).duplicates()
        assert told
        assert str(tmp_path) in told[0]
        clean = load_data(str(tmp_path), limit=limit, remove_duplicates=True)
        assert clean.duplicates() == []
        assert len(clean.test) == 8


def test_streamed_images_are_not_compared(tmp_path):
    from shard_files import write_parquet_shards

    write_parquet_shards(tmp_path, [12, 12])
    assert load_data(str(tmp_path), stream=True).duplicates() == []
    with pytest.raises(UsageError, match="remove_duplicates compares decoded images"):
        load_data(str(tmp_path), stream=True, remove_duplicates=True)


def test_digits_have_no_duplicates():
    assert load_data().duplicates() == []


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), max_size=30),
    st.lists(st.integers(0, 6), max_size=10),
)
def test_what_is_kept_has_one_label_and_is_in_no_later_split(images, later):
    hashes = np.array([image for image, _ in images], np.uint64)
    labels = np.array([label for _, label in images], np.int64)
    split = Hashed("train", hashes, labels, str)
    other = Hashed("test", np.array(later, np.uint64), np.zeros(len(later), np.int64), str)
    kept = kept_without_duplicates(split, [other], unambiguous=True).tolist()
    for i, (image, _) in enumerate(images):
        several = len({label for twin, label in images if twin == image}) > 1
        assert (i in kept) == (image not in later and not several)
    told = describe_duplicates("here", [split, other], ["a", "b"])
    shared = sum(image in hashes for image in later)
    assert any(f"{shared} of {len(later)} test images" in each for each in told) == bool(shared)


def test_hashes_follow_rows_and_pixels():
    pixels = torch.randint(0, 256, (3000, 1, 4, 4), dtype=torch.uint8)
    pixels[2999] = pixels[5]
    hashes = image_hashes(pixels, torch.arange(3000))
    assert hashes[2999] == hashes[5]
    assert len(np.unique(hashes)) == 2999
    rows = torch.tensor([7, 2999, 5])
    assert (image_hashes(pixels, rows) == hashes[rows.numpy()]).all()
    assert len(image_hashes(pixels, rows[:0])) == 0


def test_classes_that_lose_their_images_are_told(tmp_path):
    for i in range(20):
        save(tmp_path / "a" / f"{i}.png", i)
    for name in ("b", "z"):
        for i in range(5):
            save(tmp_path / name / f"{i}.png", 99)
    with pytest.warns(SmallfryWarning, match="without duplicates, b, z: no training image"):
        data = load_data(str(tmp_path), remove_duplicates=True)
    assert data.train.labels.unique().tolist() == [0]
