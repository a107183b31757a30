"""Odd labels of images with several classes, in files and in class folders."""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from image_files import write_images

from smallfry.data import load_data
from smallfry.data.label_files import LabelColumns
from smallfry.data.several_labels import LabelForm, find_several
from smallfry.errors import DataError, UsageError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture
def folder(tmp_path):
    """A folder of eight images."""
    write_images(tmp_path / "set", 8)
    return tmp_path / "set"


def lines(folder, *labels):
    """JSON lines with such labels, of the first images."""
    rows = [{"image": f"{i:03}", "labels": each} for i, each in enumerate(labels)]
    (folder / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return find_several(folder, Path("l.jsonl"), LabelColumns(), LabelForm())


def table(folder, text, form=None, columns=None):
    (folder / "l.csv").write_text(text)
    return find_several(
        folder, Path("l.csv"), columns or LabelColumns(), LabelForm() if form is None else form
    )


def classes_of(found):
    return [sorted(image.classes) for image in found.images]


def test_empty_names_in_a_list_are_no_class(folder):
    found = lines(folder, ["a", "", " "], [""], ["b", "a", "a"])
    assert found.classes == ("a", "b")
    assert classes_of(found) == [["a"], [], ["a", "b"]]


def test_numbers_in_a_list_are_names(folder):
    found = lines(folder, [1, "2"], [2], 3)
    assert found.classes == ("1", "2", "3")
    assert classes_of(found) == [["1", "2"], ["2"], ["3"]]


def test_spellings_of_unicode_are_one_class(folder):
    assert lines(folder, [COMPOSED, DECOMPOSED], [DECOMPOSED]).classes == (COMPOSED,)
    assert lines(folder, f"{DECOMPOSED}|a", COMPOSED).classes == ("a", COMPOSED)


@pytest.mark.parametrize("head", ["split", "Split", "SPLIT"])
def test_a_column_of_splits_is_no_class_in_any_letters(head, folder):
    found = table(folder, f"image,a,b,{head}\n000,1,0,train\n001,0,1,train\n002,1,1,test\n")
    assert found.classes == ("a", "b")
    assert [image.split for image in found.images] == ["train", "train", "test"]
    assert classes_of(found) == [["a"], ["b"], ["a", "b"]]


def test_a_class_of_another_split_alone_is_refused_with_its_line(folder):
    with pytest.raises(DataError, match=r"line 3: class 'dgo' is not among .*did you mean 'dog'"):
        table(folder, "image,labels,split\n000,dog|cat,train\n001,dgo,test\n")


def test_one_column_twice_is_refused(folder):
    text = "image,a,b\n000,1,0\n001,0,1\n"
    with pytest.raises(UsageError, match=r"data\.label_columns has 'a' twice"):
        table(folder, text, LabelForm(("a", "b", "a")))
    assert table(folder, text, LabelForm(("b", "a"))).classes == ("b", "a")


@pytest.mark.parametrize(
    ("cells", "separator", "wanted"),
    [
        (("a|b", "c"), None, [["a", "b"], ["c"]]),
        (("a|b", "c;d"), None, [["a", "b"], ["c;d"]]),
        (("a;b", "c d"), None, [["a", "b"], ["c d"]]),
        (('"a,b"', "c"), None, [["a", "b"], ["c"]]),
        (("a||b|", "| c"), None, [["a", "b"], ["c"]]),
        (("a b", "c"), " ", [["a", "b"], ["c"]]),
        (("a.b", "a"), ".", [["a", "b"], ["a"]]),
        (("a|b", "c"), "/", [["a|b"], ["c"]]),
    ],
)
def test_cells_are_divided_at_the_separator(cells, separator, wanted, folder):
    rows = "".join(f"{i:03},{cell}\n" for i, cell in enumerate(cells))
    assert classes_of(table(folder, f"image,labels\n{rows}", LabelForm((), separator))) == wanted


@pytest.mark.parametrize(
    ("yes", "no"), [("1", "0"), ("1.0", "0.0"), ("True", "False"), (" 1", "0 ")]
)
def test_yes_and_no_are_written_in_several_ways(yes, no, folder):
    found = table(folder, f"image,a,b\n000,{yes},{no}\n001,{no},{yes}\n002,{no},{no}\n")
    assert classes_of(found) == [["a"], ["b"], []]


def test_columns_of_other_numbers_are_no_classes(folder):
    with pytest.raises(UsageError, match=r"data\.label: none has a usual name"):
        table(folder, "image,a,b\n000,1,7\n001,0,1\n")


def write_photos(place, name, seed):
    write_images(place / name, 1, seed=seed)
    (place / name / "000.png").rename(place / name / f"{seed}.png")


def test_a_class_folder_that_training_lacks_is_named_by_its_own_image(tmp_path):
    for number, name in enumerate(("train/cat", "train/dog", "test/cat", "test/owl")):
        write_photos(tmp_path, name, number)
    with pytest.raises(DataError, match=r"test/owl/3\.png: its test split has the classes owl,"):
        find_several(tmp_path, None, LabelColumns(), LabelForm())


def test_the_form_of_a_file_is_not_for_folders(tmp_path):
    write_photos(tmp_path, "cat", 0)
    for form in (LabelForm(("a",)), LabelForm((), "|")):
        with pytest.raises(UsageError, match=r"are of the file data\.labels"):
            find_several(tmp_path, None, LabelColumns(), form)


def test_images_without_a_class_are_held_out_as_a_class_of_their_own(folder):
    write_images(folder, 20)
    labels = [["a"] if i < 10 else [] for i in range(20)]
    lines(folder, *labels)
    given = {"labels": "l.jsonl", "several_labels": True, "min_classes": 1}
    data = load_data(str(folder), **given, validation=0.2, test=0.5)
    shares = [part.labels[:, 0].tolist() for part in (data.train, data.validation, data.test)]
    assert sorted(map(len, shares)) == [2, 8, 10]
    assert shares[2].count(1) == 5
    assert shares[1].count(1) == 1
    assert np.sum([sum(each) for each in shares]) == 10


def test_the_command_names_the_line_in_one_line(folder, capsys):
    from smallfry.cli import main

    (folder / "l.csv").write_text("image,labels\n000,a\n" + "x" * 300 + ",b\n")
    words = ["train", "--task=multilabel", "--data", str(folder), "--data.labels=l.csv"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert re.search(r"l\.csv, line 3: no image 'x+", error)
    assert len(error.splitlines()) == 1


def test_lists_as_python_writes_them_are_lists(folder):
    rows = ["000,['cat']", "001,\"['cat', 'dog']\"", '002,"[""it\'s"", 7]"', "003,[]"]
    found = table(folder, "image,labels\n" + "\n".join(rows) + "\n")
    assert classes_of(found) == [["cat"], ["cat", "dog"], ["7", "it's"], []]
    for cell in ("\"['cat' 'dog']\"", '"[cat, dog]"', "['cat'"):
        text = f"image,labels\n000,cat\n001,{cell}\n"
        if cell.startswith("['cat'"):
            assert ["['cat'"] in classes_of(table(folder, text))
            continue
        with pytest.raises(DataError, match=r"line 3: .* is no list of class names; expected one"):
            table(folder, text)
    assert classes_of(table(folder, "image,labels\n000,[none]\n001,a\n")) == [["[none]"], ["a"]]
