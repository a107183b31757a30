"""Odd sources: marks of byte order, pictures of other colours, single pixels, half characters."""

import json
import os
import re
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shard_files import add, picture, write_parquet_shards, write_tar_shards

from smallfry.data import load_data
from smallfry.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from smallfry.data.image_data import ImageData
from smallfry.data.named import find_source
from smallfry.data.own import write_data
from smallfry.data.registered import Wanted, settings_from
from smallfry.data.sources import class_indices, class_texts, shard_files
from smallfry.data.splits import Split
from smallfry.errors import DataError, UsageError
from smallfry_runtime.names import text_of

# Shards


def test_names_of_classes_may_begin_with_a_mark_of_byte_order(tmp_path):
    write_tar_shards(tmp_path, [6])
    (tmp_path / "classes.txt").write_bytes("\ufeffcat\r\ndog\r\nowl\r\n".encode())
    source = find_source(str(tmp_path))
    assert source.classes == ("cat", "dog", "owl")
    assert source.splits["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [("cat\ndog\ncat\n", "'cat' stands there twice"), ("cat\n\nowl\n", "a line is empty")],
)
def test_a_list_of_classes_has_one_name_in_a_line(text, said, tmp_path):
    write_tar_shards(tmp_path, [6])
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=re.escape(f"expected one class name per line, but {said}")):
        find_source(str(tmp_path))


def write_tar(folder, labels, ending="cls"):
    with tarfile.open(folder / "train-0.tar", "w") as archive:
        for number, label in enumerate(labels):
            add(archive, f"{number}.png", picture(number))
            add(archive, f"{number}.{ending}", label)


def test_labels_in_tar_files_may_begin_with_a_mark_of_byte_order(tmp_path):
    write_tar(tmp_path, ["\ufeff1\r\n".encode(), b" 0 ", b"1"])
    source = find_source(str(tmp_path))
    assert source.classes == (0, 1) or source.classes == ("0", "1")
    assert source.splits["train"].labels.tolist() == [1, 0, 1]


def test_half_of_a_character_in_a_tar_file_is_a_question_mark(tmp_path):
    labels = [json.dumps({"label": name}).encode() for name in ("a\udfff", "b", "a\udfff")]
    write_tar(tmp_path, labels, "json")
    source = find_source(str(tmp_path))
    assert source.classes == ("a?", "b")
    assert source.splits["train"].labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (b"", "expected a number or a name, in UTF-8"),
        (b"\xff", "expected a number or a name, in UTF-8"),
        (b" \n", "expected a number or a name, in UTF-8"),
    ],
)
def test_a_tar_file_with_an_empty_label_names_the_sample(label, said, tmp_path):
    write_tar(tmp_path, [b"1", label])
    with pytest.raises(DataError, match=rf"train-0\.tar: '1', its \.cls: {said}"):
        find_source(str(tmp_path))


def test_shards_are_sorted_into_splits_by_words_of_their_names(tmp_path):
    names = ["train-0.parquet", "data/val_1.parquet", "test/0000.parquet", "Training.x.parquet"]
    for name in names[:3]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".train-9.parquet").touch()
    found = {split: [f.name for f in files] for split, files in shard_files(tmp_path).items()}
    assert found == {
        "train": ["train-0.parquet"],
        "validation": ["val_1.parquet"],
        "test": ["0000.parquet"],
    }
    (tmp_path / names[3]).touch()
    with pytest.raises(DataError, match=r"Training and train are both the train split"):
        shard_files(tmp_path)
    (tmp_path / names[3]).rename(tmp_path / "strain.parquet")
    with pytest.raises(DataError, match=r"strain\.parquet: unknown split"):
        shard_files(tmp_path)


def test_shards_without_a_split_are_for_training(tmp_path):
    write_parquet_shards(tmp_path, [6])
    for file in tmp_path.iterdir():
        file.rename(tmp_path / "photos.parquet")
    assert list(shard_files(tmp_path)) == ["train"]
    assert len(find_source(str(tmp_path)).splits["train"].labels) == 6


@given(st.lists(st.sampled_from(["a", "b", "c", "z", None, -1]), max_size=12))
def test_labels_are_places_of_their_classes(values):
    labels, strangers = class_indices(values, ["a", "b", "c"])
    wanted = [-1 if v in (None, -1) else {"a": 0, "b": 1, "c": 2}.get(v, -2) for v in values]
    assert labels.tolist() == wanted
    assert labels.dtype == np.int64
    assert strangers == (("z",) if "z" in values else ())


def test_minus_one_is_a_class_where_training_has_it():
    assert class_indices([-1, 1, None], [-1, 1])[0].tolist() == [0, 1, -1]


def test_classes_that_read_the_same_are_refused():
    pair = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    with pytest.raises(DataError, match="here: two classes are named 'é'"):
        class_texts("here", pair)
    assert class_texts("here", [1, "b"]) == ("1", "b")


@given(st.text(st.characters(exclude_categories=()), max_size=12))
def test_any_name_becomes_text(name):
    text = text_of(name)
    text.encode()
    assert text_of(text) == text
    if not any(0xD800 <= ord(each) <= 0xDFFF for each in name):
        assert text == unicodedata.normalize("NFC", name)


def test_bytes_of_older_systems_are_read_as_latin_1():
    assert text_of(os.fsdecode(b"caf\xe9")) == "café"
    assert text_of("\ud83d") == "?"


# Objects of Python


@pytest.mark.parametrize(
    "mode", ["CMYK", "YCbCr", "HSV", "RGBX", "RGBa", "PA", "P", "LA", "1", "LAB"]
)
def test_pictures_of_any_colours_are_written(mode, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each).convert("RGBA") for each in pixels]
    if mode == "PA":
        pictures = [each.convert("RGB").quantize().convert("PA") for each in pictures]
    elif mode == "LAB":
        pictures = [Image.merge(mode, each.split()[:3]) for each in pictures]
    elif mode in ("CMYK", "YCbCr", "HSV", "RGBX", "P", "1"):
        pictures = [each.convert("RGB").convert(mode) for each in pictures]
    else:
        pictures = [each.convert(mode) for each in pictures]
    place = write_data((pictures, [0, 1] * 3), tmp_path / "set")
    data = load_data(str(place), validation=0, test=0, channels=3)
    for image, given_one in zip(data.train.images, pictures, strict=True):
        wanted = np.asarray(given_one.convert("RGBA").convert("RGB") if mode == "RGBa" else
                            given_one.convert("RGB"))  # fmt: skip
        assert np.array_equal(image.numpy().transpose(1, 2, 0), wanted)


def test_pictures_that_can_not_be_written_are_named(tmp_path):
    pictures = [Image.new("L", (4, 4)), Image.new("F", (4, 4))]
    with pytest.raises(DataError, match="image 1: a picture of the mode F; convert it to RGB or"):
        write_data((pictures, [0, 1]), tmp_path / "set")
    assert not (tmp_path / "set").exists()


# Corruptions


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_smallest_images_and_none_are_corrupted(name):
    none = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    assert corrupt(none, name, 3).shape == (0, 3, 8, 8)
    for height, width in ((1, 1), (1, 4), (3, 2)):
        images = torch.full((2, 1, height, width), 100, dtype=torch.uint8)
        for severity in (SEVERITIES[0], SEVERITIES[-1]):
            found = corrupt(images, name, severity)
            assert found.shape == images.shape
            assert found.dtype == torch.uint8
            if "blur" in name:  # of an even picture
                assert torch.equal(found, images)


def test_fog_and_frost_on_a_single_pixel_are_no_black(recwarn):
    image = torch.full((1, 1, 1, 1), 100, dtype=torch.uint8)
    assert corrupt(image, "frost_like", 1).item() == 100  # without a crystal
    assert 50 < corrupt(image, "fog", 1).item() <= 100
    assert not [each for each in recwarn if issubclass(each.category, RuntimeWarning)]


def test_images_that_are_not_contiguous_are_corrupted_alike():
    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for name in ("contrast", "pixelate", "fog"):
        assert torch.equal(corrupt(images, name, 2), corrupt(images.contiguous(), name, 2))


# Registered data


def test_duplicates_are_told_of_data_without_places():
    pixels = torch.zeros(4, 1, 3, 3, dtype=torch.uint8)
    pixels[:3, 0, 0, 0] = torch.tensor([1, 2, 1], dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    parts = [Split(pixels, torch.tensor(rows), labels[rows]) for rows in ([0, 1], [3], [2])]
    data = ImageData("kit-set", "here", ("a", "b"), 3, 1, *parts)
    [sentence] = data.duplicates()
    assert "1 of 1 test images are in the train split too, such as kit-set[2], the" in sentence
    assert "same as kit-set[0]" in sentence
    assert len(data.without_duplicates().train) == 1


def test_settings_have_the_types_of_their_defaults():
    from smallfry.data.generators.maze import MazeSettings

    assert settings_from(MazeSettings, {"min_path": 0, "braid": 3}).min_path == 0
    for options, said in (
        ({"braids": 3}, "data.options has no 'braids'; did you mean 'braid'"),
        ({"braid": 3.0}, "data.options.braid must be of type int, got 3.0"),
        ({"braid": True}, "must be of type int, got True"),
        ({"symmetries": 1}, "must be of type bool, got 1"),
        ({"min_path": "x"}, "must be of type float, got 'x'"),
        ({"braid": 101}, "braid is 0 to 100, got 101"),
        ({"min_path": 0.95}, "min_path is 0 to 0.9"),
        ({"split": "clas"}, "split is puzzle or class, got 'clas'"),
        ({"puzzles": 9}, "puzzles is 10 to 1,000,000, or 0"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            settings_from(MazeSettings, options)


@pytest.mark.parametrize(
    ("images", "refused"),
    [
        ({"image_size": 9, "resize": "crop", "channels": 1}, None),
        ({"image_size": None, "resize": "crop", "stream": None}, None),
        ({"image_size": 8, "resize": "crop"}, "image_size"),
        ({"resize": "squash"}, "resize"),
        ({"resize": "crop", "stream": False}, "stream"),
    ],
)
def test_what_data_has_is_fixed(images, refused):
    wanted = Wanted(None, {}, 0.1, 0.1, 0, None, images)
    if refused is None:
        wanted.require_fixed("maze9", channels=1, image_size=9)
        return
    with pytest.raises(UsageError, match=rf"maze9 has no data\.{refused}: leave it out"):
        wanted.require_fixed("maze9", channels=1, image_size=9)
