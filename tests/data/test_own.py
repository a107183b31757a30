"""Data sets of arrays, tensors, Datasets and mappings of them."""

import re

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from smallfry.data import load_data
from smallfry.data.own import as_picture, is_own, keep_data, place_of, write_data
from smallfry.errors import DataError, UsageError

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (30, 8, 8), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3


class Pairs(torch.utils.data.Dataset):
    """As torchvision has them: images with numbers, and the names of classes."""

    classes = ("ant", "bee", "cat")

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], LABELS[i]


def every_image(data):
    parts = (data.train, data.validation, data.test)
    return {
        (image.numpy().tobytes(), data.classes[label])
        for part in parts
        for image, label in zip(part.images, part.labels.tolist(), strict=True)
    }


def wanted(images, names):
    """Images channels first with the names of their classes."""
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return {(im.tobytes(), names[k]) for im, k in zip(images, LABELS, strict=True)}


KINDS = {
    "grey arrays": ((GREY, LABELS), GREY, "012"),
    "colour arrays": ((COLOUR, LABELS.astype(np.uint8)), COLOUR, "012"),
    "channels first": ((COLOUR.transpose(0, 3, 1, 2), LABELS.tolist()), COLOUR, "012"),
    "one channel": ((GREY[..., None], LABELS), GREY, "012"),
    "tensors": ((torch.tensor(GREY)[:, None], torch.tensor(LABELS)), GREY, "012"),
    "names": ((GREY, ["xyz"[k] for k in LABELS]), GREY, "xyz"),
    "pillow": (([Image.fromarray(x) for x in COLOUR], LABELS), COLOUR, "012"),
    "torch Dataset": (Pairs(COLOUR), COLOUR, Pairs.classes),
    "pairs": ([(x, int(k)) for x, k in zip(GREY, LABELS, strict=True)], GREY, "012"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_labels_are_kept_to_the_bit(kind):
    given, images, names = KINDS[kind]
    assert is_own(given)
    folder = keep_data(given)
    data = load_data(str(folder))
    assert data.classes == tuple(names)
    assert every_image(data) == wanted(images, names)
    assert keep_data(given) == folder  # written once


def test_a_subset_has_the_classes_of_the_whole(tmp_path):
    whole = Pairs(COLOUR)
    first, second = torch.utils.data.random_split(whole, [20, 10])
    parts = {"train": first, "test": torch.utils.data.Subset(second, range(5))}
    data = load_data(str(keep_data(parts)))
    assert data.classes == Pairs.classes
    assert data.test_count == 5


def test_a_path_may_start_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for number in range(4):
        Image.fromarray(GREY[number]).save(tmp_path / f"{number}.png")
    files = [f"~/{number}.png" for number in range(4)]
    data = load_data(str(keep_data((files, list("abab")))), test=0, validation=0)
    assert data.train.images[:, 0].numpy().tolist() == GREY[:4].tolist()


def test_hugging_face_data_sets_keep_their_columns_and_splits(tmp_path):
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"photo": datasets.Image(), "label": label})
    pictures = [Image.fromarray(x) for x in COLOUR]
    table = datasets.Dataset.from_dict(
        {"photo": pictures, "label": [i % 2 for i in range(30)]}, features=features
    )
    parts = datasets.DatasetDict(train=table.select(range(20)), test=table.select(range(20, 30)))
    folder = write_data(parts, tmp_path / "new" / "set")
    data = load_data(str(folder))
    assert (data.classes, data.test_count) == (("no", "yes"), 10)
    assert load_data(str(keep_data(table))).classes == ("no", "yes")
    with pytest.raises(DataError, match="no column of images; there are x"):
        keep_data(datasets.Dataset.from_dict({"x": [1, 2]}))


def test_splits_are_those_of_a_mapping(tmp_path):
    parts = {"train": (GREY[:20], LABELS[:20]), "val": Pairs(GREY[20:])}
    assert is_own(parts)
    data = load_data(str(write_data(parts, tmp_path / "d", classes=Pairs.classes)))
    assert data.classes == Pairs.classes
    assert len(data.validation) == 10
    assert len(data.train) + data.test_count == 20
    with pytest.raises(UsageError, match="splits test: expected train"):
        keep_data({"test": (GREY, LABELS)})
    with pytest.raises(UsageError, match="expected train, and each once"):
        keep_data({"train": (GREY, LABELS), "val": (GREY, LABELS), "dev": (GREY, LABELS)})


def test_other_data_has_another_folder():
    folder = keep_data((GREY, LABELS))
    changed = GREY.copy()
    changed[7, 3, 3] ^= 1
    assert keep_data((changed, LABELS)) != folder
    assert keep_data((GREY, (LABELS + 1) % 3)) != folder
    assert keep_data({"test": (GREY[:3], LABELS[:3]), "train": (GREY, LABELS)}) != folder


def test_a_table_and_named_arrays_are_refused_with_what_is_expected():
    for given in (pandas.DataFrame({"image": ["a.png"], "label": ["a"]}), iter([])):
        with pytest.raises(UsageError, match="expected a folder, a pair of images and labels"):
            keep_data(given)
    named = {"images": GREY, "labels": LABELS}
    assert is_own(named)
    with pytest.raises(UsageError, match="images, labels: expected train, and each once; images a"):
        keep_data(named)
    assert not is_own({"name": "digits", "validation": np.float64(0.2), "mean": np.ones(1)})


def test_true_and_false_are_labels():
    table = keep_data((GREY, LABELS > 0))
    assert load_data(str(table)).classes == ("0", "1")
    assert every_image(load_data(str(table))) == {
        (image.tobytes(), "1" if label else "0")
        for image, label in zip(GREY[:, None], LABELS > 0, strict=True)
    }


def test_no_bars_of_files_are_shown(tmp_path, capsys):
    data = load_data(str(write_data((GREY ^ 85, LABELS), tmp_path / "d")))
    assert len(data.classes) == 3
    assert "split" not in capsys.readouterr().err


def test_names_and_settings_are_no_data():
    for given in ("digits", {"name": "digits"}, {}, None, 5):
        assert not is_own(given)
    with pytest.raises(UsageError, match="data of the type int: expected a folder, a pair of im"):
        keep_data(5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((GREY / 255, LABELS), "image 0: pixels are float64, expected uint8 from 0 to 255"),
        ((GREY, LABELS[:5]), "30 images, but 5 labels"),
        ((GREY, LABELS / 1.0), "label 0 must be a whole number or a name"),
        ((GREY, ["a", *LABELS[1:]]), "some labels are numbers and some are names"),
        ((GREY, LABELS + 1), "labels are 1 to 3, of which 3 occur: expected 0 to 2"),
        ((GREY[:0], LABELS[:0]), "holds no images"),
        ((COLOUR.reshape(30, 8, 4, 6), LABELS), "image 0: has the shape (8, 4, 6), expected"),
        (GREY, "sample 0 is no pair of an image and a label but of the type ndarray"),
        ([GREY, LABELS], "all images and all labels are a tuple: (images, labels)"),
        ((GREY.astype(int), LABELS), "image 0: pixels are int64, expected uint8 from 0 to 255"),
        ((["missing.png"], ["a"]), "missing.png: can't be read"),
    ],
)
def test_other_images_and_labels_are_refused(given, said):
    with pytest.raises(DataError, match=re.escape(said)):
        keep_data(given)


def test_labels_beyond_the_classes_and_taken_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="labels are 0 to 2, and there are 2 classes"):
        write_data((GREY, LABELS), tmp_path / "d", classes=["a", "b"])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes").write_text("")
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        write_data((GREY, LABELS), tmp_path / "x")
    with pytest.raises(DataError, match="can't be written there"):
        write_data((GREY, LABELS), tmp_path / "x" / "notes" / "d")


def test_pixels_become_pictures():
    for pixels in (COLOUR[0], COLOUR[0].transpose(2, 0, 1), torch.tensor(COLOUR[0])):
        assert np.array_equal(np.asarray(as_picture(pixels, "")), COLOUR[0])
    assert np.array_equal(np.asarray(as_picture(GREY[0][None], "")), GREY[0])
    picture = Image.new("RGB", (2, 2))
    assert as_picture(picture, "") is picture


def test_a_split_may_lack_a_class_of_the_others(tmp_path):
    parts = {"train": (GREY[:20], LABELS[:20]), "test": (GREY[20:24], [0, 2, 2, 0])}
    data = load_data(str(write_data(parts, tmp_path / "d")))
    assert data.classes == ("0", "1", "2")
    assert data.test.labels.tolist() == [0, 2, 2, 0]
    parts = {"train": (GREY[:4], [0, 2, 2, 0]), "test": (GREY[20:], LABELS[20:])}
    assert write_data(parts, tmp_path / "e").is_dir()
    with pytest.raises(DataError, match="labels are 0 to 2, of which 2 occur"):
        keep_data((GREY[:4], [0, 2, 2, 0]))


def test_numbers_are_the_classes_of_that_name_where_all_are_whole_numbers():
    names = ("0", "1", "10", "2")  # as folders are sorted
    data = load_data(place_of((GREY, [0, 1, 10, 2, 2] * 6), names), validation=0, test=0)
    assert [data.classes[i] for i in data.train.labels.tolist()] == ["0", "1", "10", "2", "2"] * 6
    padded = load_data(place_of((GREY, [7, 8] * 15), ("07", "08")), validation=0, test=0)
    assert padded.classes == ("07", "08")
    places = load_data(place_of((GREY, [0, 1] * 15), ("1", "b")), validation=0, test=0)
    assert [places.classes[i] for i in places.train.labels.tolist()] == ["1", "b"] * 15
    with pytest.raises(DataError, match="labels are 0 to 3, and there are 4 classes"):
        place_of((GREY[:2], [0, 3]), names)
    with pytest.raises(DataError, match="some labels are numbers and some are names"):
        place_of((GREY[:2], [0, "10"]), names)


def test_hugging_face_data_sets_of_files_are_read_as_they_are_now(tmp_path):
    for number, pixels in enumerate(COLOUR):
        place = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), split="train")
    folder = keep_data(table)
    data = load_data(str(folder), validation=0, test=0)
    assert (data.classes, len(data.train)) == (("a", "b"), 30)
    wanted_pixels = {x.transpose(2, 0, 1).tobytes() for x in COLOUR}
    assert {image.numpy().tobytes() for image in data.train.images} == wanted_pixels
    assert keep_data(table) == folder
    few = load_data(str(keep_data(table.select(range(0, 30, 3)))), validation=0, test=0)
    assert len(few.train) == 10
    Image.fromarray(COLOUR[3]).save(tmp_path / "photos" / "a" / "0.png")
    assert keep_data(table) != folder
    (tmp_path / "photos" / "a" / "0.png").unlink()
    with pytest.raises(DataError, match=r"can't be read .*0\.png"):
        keep_data(table)
