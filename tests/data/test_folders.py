"""Folders as people have them: what is a class, a split, an image, and what is none of these."""

import os
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smallfry.data import load_data
from smallfry.errors import DataError, SmallfryWarning
from smallfry_runtime.artifacts import is_artifact
from smallfry_runtime.inputs import SYSTEM, find_images, list_folder, unread_pictures
from smallfry_runtime.names import path_of, storable, text_of

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
LATIN_1 = os.fsdecode("café".encode("latin-1"))


def write(folder: Path, count: int = 6, ending: str = "png") -> None:
    """Images that no other folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(list(os.fsencode(folder)))
    for i in range(count):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.{ending}")


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / "photos" / name)
    return tmp_path / "photos"


def count(folder, **options) -> int:
    data = load_data(str(folder), **options)
    return len(data.train) + len(data.validation) + data.test_count


# What is no class


@pytest.mark.parametrize(
    "files",
    [
        ("config.yaml", "best/model.safetensors", "pictures/a.png"),
        ("config.yaml", ".lock", "pictures/a.png"),
        ("manifest.json", "model.onnx", "a.png"),
        ("manifest.json", "embed.onnx", "quantization.png"),
        ("config.json", "model.safetensors", "confusion_matrix.png"),
        ("manifest.json", "model.safetensors", "a.png"),
        ("report.html", "summary.json", "latency.png"),
        ("study.json", "pictures/a.png"),
    ],
    ids=lambda files: files[0] + files[1],
)
@pytest.mark.parametrize("place", ["out", "runs/first", "cat/run", "cat/a/b"])
def test_what_smallfry_wrote_among_the_images_is_none_of_them(photos, place, files):
    before = load_data(str(photos)).fingerprint
    for name in files:
        file = photos / place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(file, "PNG")
    data = load_data(str(photos))
    assert data.classes == ("cat", "dog")
    assert data.fingerprint == before


def test_a_class_with_a_file_of_settings_is_a_class(photos):
    for name in ("config.yaml", "config.json", "manifest.json", "summary.json"):
        (photos / "cat" / name).write_text("{}")
    assert not is_artifact(os.listdir(photos / "cat"))
    assert load_data(str(photos)).classes == ("cat", "dog")


@pytest.mark.parametrize(
    "name", [*sorted(SYSTEM), ".thumbnails", ".AppleDouble", "@eaDir", "#Recycle"]
)
def test_folders_of_a_system_hold_no_images_and_are_no_classes(photos, name):
    write(photos / name)
    write(photos / "cat" / name)
    write(photos / "cat" / "tabby" / name / "000.png")  # a folder for each file, as Synology has
    assert count(photos) == 12
    assert load_data(str(photos)).classes == ("cat", "dog")


def test_files_of_a_system_are_not_told(photos, caplog):
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._000.png", "Icon\r"):
        (photos / "cat" / name).write_bytes(b"a system was here")
    with caplog.at_level("INFO", "smallfry"):
        assert count(photos) == 12
    assert "left out" not in caplog.text


def test_links_back_make_no_class_and_no_image_twice(photos):
    (photos / "all").symlink_to(photos)
    (photos / "up").symlink_to(photos.parent)
    (photos / "cat" / "back").symlink_to(photos)
    (photos / "cat" / "itself").symlink_to("itself")
    assert load_data(str(photos)).classes == ("cat", "dog")
    assert count(photos) == 12


def test_a_class_folder_may_be_a_link(photos, tmp_path):
    write(tmp_path / "elsewhere")
    (photos / "owl").symlink_to(tmp_path / "elsewhere")
    assert load_data(str(photos)).classes == ("cat", "dog", "owl")


def test_a_class_that_is_a_link_to_nothing_is_told(photos):
    (photos / "owl").symlink_to(photos / "nowhere")
    with pytest.warns(SmallfryWarning, match="owl: ignored a broken link"):
        assert load_data(str(photos)).classes == ("cat", "dog")


def test_a_folder_that_can_not_be_opened_loses_no_image_in_silence(photos, monkeypatch):
    closed, scandir = photos / "cat" / "tabby", os.scandir
    write(closed)

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="tabby: this folder can't be opened"):
        load_data(str(photos))
    found = list(find_images([str(photos)], None))
    assert len(found) == 1
    assert "can't be opened" in found[0].error


# What is left out


@pytest.mark.parametrize(
    "ending", ["heic", "HEIC", "heif", "jxl", "dng", "CR2", "psd", "svg", "dcm"]
)
def test_pictures_of_a_format_that_is_not_read_are_counted_and_named(photos, ending):
    for i in range(5):
        (photos / "cat" / f"p{i}.{ending}").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.warns(SmallfryWarning, match=rf"5 pictures ignored.*5 \.{ending.lower()}, such as"):
        assert count(photos) == 12


def test_an_image_without_an_ending_is_counted_too(photos):
    (photos / "cat" / "000.png").rename(photos / "cat" / "IMG_0001")
    (photos / "cat" / "README").write_text("all of them are cats")
    with pytest.warns(SmallfryWarning, match="1 pictures ignored.*1 without an extension"):
        assert count(photos) == 11


def test_other_files_are_counted_where_one_looks_for_it(photos, caplog):
    for name in ("a.xml", "b.xml", "c.zip"):
        (photos / "cat" / name).write_text("")
    (photos / "labels.csv").write_text("")
    with caplog.at_level("INFO", "smallfry"):
        assert count(photos) == 12
    assert "ignored files that are not images: 2 .xml, 1 .zip, 1 .csv" in caplog.text


def test_a_class_of_archives_or_unread_pictures_alone_says_what_is_there(photos):
    (photos / "owl").mkdir()
    (photos / "owl" / "owls.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"owl: empty class folder, except for 1 \.zip"):
        load_data(str(photos))


def test_predictions_name_the_pictures_of_a_folder_that_are_not_read(photos):
    (photos / "cat" / "p.heic").write_bytes(b"x")
    found = list(find_images([str(photos)], None))
    assert len(found) == 13
    assert [each.name for each in found if each.error] == [str(photos / "cat" / "p.heic")]


def test_endings_of_any_case_are_read(photos):
    for file in (photos / "cat").iterdir():
        file.rename(file.with_suffix(".PnG"))
    assert count(photos) == 12


def test_a_file_that_can_not_be_looked_into_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert unread_pictures([tmp_path / "pipe", tmp_path / "missing"]) == []


# Splits


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("val", "validation"),
        ("train", "Train"),
        ("valid", "VAL"),
        ("test", "testing"),
        ("dev", "val"),
    ],
)
def test_two_folders_of_one_split_are_refused(tmp_path, one, other):
    for split in {"train", one, other}:
        for name in ("cat", "dog"):
            write(tmp_path / split / name)
    with pytest.raises(DataError, match=rf"({one} and {other}|{other} and {one}) are both the"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("name", ["Train", "TRAINING", "train"])
def test_a_split_may_be_written_in_any_case(tmp_path, name):
    for split, number in {name: 8, "Val": 2, "TEST": 4}.items():
        for inner in ("cat", "dog"):
            write(tmp_path / split / inner, number)
    data = load_data(str(tmp_path))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [16, 4, 8]


def test_a_class_that_is_called_train_is_not_taken_for_all(photos):
    write(photos / "train" / "steam")
    with pytest.raises(
        DataError,
        match="train: unclear whether this is a class like cat, dog or",
    ):
        load_data(str(photos))
    write(photos / "train")  # images of its own: no split's folder has those
    (photos / "train" / "steam").rename(photos / "steam")
    assert load_data(str(photos)).classes == ("cat", "dog", "steam", "train")


def test_images_beside_the_splits_are_told(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write(tmp_path / split / name)
    (tmp_path / "docs").mkdir()
    assert count(tmp_path, test=0.0) == 24
    write(tmp_path / "unlabelled")
    with pytest.warns(SmallfryWarning, match="ignored unlabelled, with images outside the class"):
        assert count(tmp_path, test=0.0) == 24


def test_a_test_folder_without_classes_is_told_and_not_taken(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / "train" / name)
    write(tmp_path / "test")
    with pytest.warns(SmallfryWarning, match="ignored test, with images outside the class folders"):
        assert count(tmp_path) == 12


@pytest.mark.parametrize(
    ("names", "inner"),
    [
        (("train", "test"), "."),
        (("train", "test1"), "."),
        (("train_images", "test_images"), "."),
        (("train2017", "Val2017"), "cat"),
    ],
)
def test_splits_without_class_folders_or_of_other_names_are_no_classes(tmp_path, names, inner):
    for split in names:
        write(tmp_path / split / inner)
    with pytest.raises(DataError, match=rf"whether .*{names[0]}.* splits; if so, name them train"):
        load_data(str(tmp_path))


def test_a_class_may_begin_like_a_split_beside_others(photos):
    write(photos / "test tubes")
    assert load_data(str(photos)).classes == ("cat", "dog", "test tubes")


def test_a_test_folder_may_lack_a_class_or_have_one_more(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog", "owl"):
            write(tmp_path / split / name)
    for file in (tmp_path / "test" / "dog").iterdir():
        file.unlink()
    (tmp_path / "test" / "dog").rmdir()
    assert load_data(str(tmp_path)).test.labels.unique().tolist() == [0, 2]
    write(tmp_path / "test" / "yak")
    with pytest.warns(SmallfryWarning, match="6 of 18 test images are of yak, not among the"):
        data = load_data(str(tmp_path))
    assert data.test.labels.tolist() == [0] * 6 + [2] * 6


def test_a_test_class_in_other_letters_or_none_of_training_is_refused(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / "train" / name)
    write(tmp_path / "test" / "dog")
    write(tmp_path / "test" / "Cat")
    with pytest.raises(DataError, match=r"class 'Cat' is not among .*did you mean 'cat'"):
        load_data(str(tmp_path))
    (tmp_path / "test" / "Cat").rename(tmp_path / "test" / "yak")
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "emu")
    with pytest.raises(DataError, match="class 'emu' is not among the training classes"):
        load_data(str(tmp_path))


def test_a_folder_named_like_a_data_set_is_told_and_can_be_named(photos, monkeypatch):
    photos.rename(photos.with_name("digits"))
    monkeypatch.chdir(photos.parent)
    with pytest.warns(SmallfryWarning, match=r"'digits' selects the data set .* './digits'"):
        assert load_data("digits").classes == tuple("0123456789")
    assert load_data("./digits").classes == ("cat", "dog")


# Names


def test_one_class_in_two_spellings_of_unicode_is_one(tmp_path):
    for split, name in {"train": COMPOSED, "val": DECOMPOSED, "test": LATIN_1}.items():
        write(tmp_path / split / name)
        write(tmp_path / split / "tea")
    data = load_data(str(tmp_path))
    assert data.classes == (COMPOSED, "tea")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [12, 12, 12]


@pytest.mark.parametrize("name", [DECOMPOSED, LATIN_1])
def test_two_spellings_of_one_class_in_one_folder_are_refused(tmp_path, name):
    for each in (COMPOSED, name, "tea"):
        write(tmp_path / each)
    with pytest.raises(DataError, match=f"two folders have the class name '{COMPOSED}'"):
        load_data(str(tmp_path))


def test_a_copy_in_another_spelling_has_the_same_fingerprint(tmp_path):
    for place, form in (("here", "NFC"), ("there", "NFD")):
        for number, name in enumerate(("cafz", "café", "zoé")):
            folder = tmp_path / place / unicodedata.normalize(form, name)
            folder.mkdir(parents=True)
            for i, file in enumerate(("az", "äé", "b")):
                pixels = np.full((8, 8), 50 * number + i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{unicodedata.normalize(form, file)}.png")
    here, there = (load_data(str(tmp_path / place)) for place in ("here", "there"))
    assert here.classes == there.classes == ("cafz", "café", "zoé")
    assert torch.equal(here.train.images, there.train.images)
    assert here.fingerprint == there.fingerprint


def test_the_fingerprint_of_earlier_versions_is_known(tmp_path):
    for name in (DECOMPOSED, "tea"):
        write(tmp_path / name)
    data = load_data(str(tmp_path))
    earlier = data._fingerprint((DECOMPOSED, "tea"))  # which took names as they stand
    assert earlier != data.fingerprint
    assert data.matches(earlier)
    assert data.matches(data.fingerprint)
    assert not data.matches("0" * 16)


def test_one_name_that_is_not_utf_8_blocks_no_data_set(tmp_path):
    for name in (LATIN_1, "tea"):
        write(tmp_path / name)
    (tmp_path / "tea" / "000.png").rename(tmp_path / "tea" / os.fsdecode(b"\xff\xfe.png"))
    data = load_data(str(tmp_path))
    assert data.classes == (COMPOSED, "tea")
    assert len(data.fingerprint) == 16
    (tmp_path / "tea" / os.fsdecode(b"broken\xe9.png")).write_bytes(b"no image")
    with pytest.raises(DataError, match="broken"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["a b", " a", "a\nb", "a\tb", "-a", "a'b", "a,b", "🐈", "null", "1"]
)
def test_any_name_may_be_a_class(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / "z")
    assert set(load_data(str(tmp_path)).classes) == {name, "z"}


@pytest.mark.parametrize(
    ("name", "text"),
    [("cat", "cat"), (DECOMPOSED, COMPOSED), (LATIN_1, COMPOSED), ("\udcff", "ÿ"), ("猫", "猫")],
)
def test_names_become_text_that_everything_can_hold(name, text):
    assert text_of(name) == text
    assert text_of(text) == text
    text_of(name).encode()


@pytest.mark.parametrize("path", ["/a/b c", "/a/é", os.fsdecode(b"/a/\xe9%20#?")])
def test_a_path_comes_back_from_what_is_stored_of_it(path):
    storable(path).encode()
    assert path_of(storable(path)) == Path(path)
    assert storable("relative") == "relative"


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert path_of("~/photos") == Path("/home/ann/photos")


# Lists of files


def test_a_listing_names_what_it_skips(photos):
    write(photos / "cat" / "@eaDir")
    (photos / "cat" / "run").mkdir()
    for name in ("config.yaml", ".lock"):
        (photos / "cat" / "run" / name).touch()
    (photos / "cat" / "notes.txt").touch()
    found = list_folder(photos / "cat")
    assert len(found.images) == 6
    assert [path.name for path in found.others] == ["notes.txt"]
    assert sorted(path.name for path in found.skipped) == ["@eaDir", "run"]


def test_images_in_a_run_can_be_named_themselves(tmp_path):
    write(tmp_path / "run" / "pictures", 2)
    for name in ("config.yaml", ".lock"):
        (tmp_path / "run" / name).touch()
    assert len(list_folder(tmp_path / "run").images) == 2
    assert list_folder(tmp_path).images == []


def test_an_archive_of_latin_1_names_is_read_as_it_unpacks(tmp_path):
    write(tmp_path / "one" / LATIN_1)
    write(tmp_path / "one" / "tea")
    (tmp_path / "two").mkdir()
    pack = f"tar -cf - -C '{tmp_path}/one' . | tar -xf - -C '{tmp_path}/two'"
    subprocess.run(["bash", "-c", pack], check=True)
    data = [load_data(str(tmp_path / place)) for place in ("one", "two")]
    assert data[0].fingerprint == data[1].fingerprint
