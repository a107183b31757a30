"""Odd files of labels: names that no file can have, other letters, places and kinds of cells."""

import json
import logging
import re
import unicodedata
from pathlib import Path

import pytest
from image_files import write_images

from smallfry.data import load_data
from smallfry.data.label_files import LabelColumns, choose_column, read_label_file
from smallfry.errors import DataError, UsageError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
FIRST, SECOND, THIRD = (f"images/{i:03}.png" for i in range(3))


@pytest.fixture
def folder(tmp_path):
    """A folder of six images in a subfolder."""
    write_images(tmp_path / "set" / "images", 6)
    return tmp_path / "set"


def read(folder, text, name="labels.csv", columns=None):
    content = text if isinstance(text, str) else "\n".join(json.dumps(row) for row in text)
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return read_label_file(folder, Path(name), columns)


def labelled(source):
    """Names of files with their classes, by split."""
    return {
        split: {
            Path(part.locate(i)).name: source.classes[label] if label >= 0 else label
            for i, label in enumerate(part.labels.tolist())
        }
        for split, part in source.splits.items()
    }


# Columns of splits


@pytest.mark.parametrize("head", ["image,label,split", "Image,Label,Split", "FILE,CLASS,SPLIT"])
def test_a_column_of_splits_is_found_in_any_letters(head, folder):
    source = read(folder, f"{head}\n{FIRST},a,train\n{SECOND},b,Train\n{THIRD},a,TEST\n")
    assert labelled(source) == {
        "train": {"000.png": "a", "001.png": "b"},
        "test": {"002.png": "a"},
    }


def test_two_columns_of_splits_are_no_choice(folder):
    with pytest.raises(UsageError, match=r"data\.split_column: split and Split could be it"):
        read(folder, f"image,label,split,Split\n{FIRST},a,train,test\n")
    source = read(
        *(folder, f"image,label,split,Split\n{FIRST},a,train,test\n{SECOND},a,test,train\n"),
        columns=LabelColumns(split="split"),
    )
    assert labelled(source)["train"] == {"000.png": "a"}


@pytest.mark.parametrize(
    ("word", "split"),
    [("training", "train"), ("VALID", "validation"), ("dev", "validation"), ("testing", "test")],
)
def test_splits_have_their_usual_names(word, split, folder):
    source = read(folder, f"image,label,split\n{FIRST},a,train\n{SECOND},a, {word} \n")
    assert "001.png" in labelled(source)[split]


def test_a_row_without_a_split_is_for_training(folder):
    rows = [{"image": FIRST, "label": "a", "split": ""}, {"image": SECOND, "label": "a"}]
    rows += [{"image": THIRD, "label": "a", "split": None}]
    assert labelled(read(folder, rows, "l.jsonl")) == {
        "train": dict.fromkeys(("000.png", "001.png", "002.png"), "a")
    }


def test_a_column_is_chosen_by_its_exact_name_first(folder):
    names = ["Label", "label", "image"]
    assert choose_column(folder, names, "Label", "label", ("label",)) == "Label"
    with pytest.raises(UsageError, match="Label and label could be it; there are Label, label, im"):
        choose_column(folder, names, None, "label", ("label",))
    with pytest.raises(UsageError, match=r"has no column 'labl'; did you mean '\w+'"):
        choose_column(folder, names, "labl", "label", ("label",))


# Places


def test_a_file_of_labels_may_lie_beside_the_folder_of_images(folder):
    (folder / "labels.csv").write_text("id,label\n000,a\n001.png,b\n")
    source = read_label_file(folder / "images", Path("../labels.csv"))
    assert labelled(source)["train"] == {"000.png": "a", "001.png": "b"}
    absolute = read_label_file(folder / "images", folder / "labels.csv")
    assert labelled(absolute) == labelled(source)
    (folder / "labels.csv").write_text("id,label\n000,a\n900,b\n")
    with pytest.raises(DataError, match=r"line 3: no image '900' in .*images$"):
        read_label_file(folder / "images", Path("../labels.csv"))


def test_an_image_beside_a_file_elsewhere_is_outside(folder):
    (folder / "labels.csv").write_text("image,label\n../images/000.png,a\n../labels.csv,b\n")
    with pytest.raises(DataError, match=r"line 3: '\.\./labels\.csv' is outside .*images; move"):
        read_label_file(folder / "images", Path("../labels.csv"))


def test_a_missing_image_is_not_called_outside_where_it_could_be(folder):
    (folder / "more").mkdir()
    with pytest.raises(DataError, match=r"line 2: no image '\.\./images/900\.png' in"):
        read(folder, "image,label\n../images/900.png,a\n", "more/labels.csv")
    source = read(folder, "image,label\n../images/004.png,a\n", "more/labels.csv")
    assert labelled(source)["train"] == {"004.png": "a"}


def test_the_image_beside_the_file_comes_before_that_of_the_folder(folder):
    write_images(folder, 1, seed=3)
    write_images(folder / "more", 1, seed=4)
    source = read(folder, "image,label\n000.png,a\n", "more/labels.csv")
    assert source.splits["train"].locate(0) == str(folder / "more" / "000.png")


def test_a_name_with_its_extension_comes_before_one_that_lacks_it(folder):
    write_images(folder, 2)
    (folder / "001.png").rename(folder / "000.png.jpg")
    source = read(folder, "image,label\n000.png,a\n")
    assert source.splits["train"].locate(0) == str(folder / "000.png")


@pytest.mark.parametrize("folder_name", ["set", "./set", "set/../set"])
def test_images_that_are_not_listed_are_counted_in_a_relative_folder(
    folder_name, folder, monkeypatch, caplog
):
    monkeypatch.chdir(folder.parent)
    (folder / "labels.csv").write_text(f"image,label\n{FIRST},a\n{SECOND},b\n")
    with caplog.at_level(logging.INFO):
        read_label_file(Path(folder_name), Path("labels.csv"))
    assert "ignored 4 images that labels.csv does not list" in caplog.text
    caplog.clear()
    rows = "".join(f"images/{i:03}.png,a\n" for i in range(6))
    (folder / "labels.csv").write_text(f"image,label\n{rows}")
    with caplog.at_level(logging.INFO):
        read_label_file(Path(folder_name), Path("labels.csv"))
    assert "does not list" not in caplog.text


# Names


@pytest.mark.parametrize("name", ["x" * 300, "images/" + "y" * 5000, "a\0b", "\ud800", "images"])
def test_a_name_that_no_image_has_is_named_with_its_line(name, folder):
    rows = [{"image": FIRST, "label": "a"}, {"image": name, "label": "a"}]
    with pytest.raises(DataError) as raised:
        read(folder, rows, "l.jsonl")
    assert str(raised.value).startswith(f"{folder / 'l.jsonl'}, line 2: no image '{name[:9]}")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_file_that_can_not_be_is_refused(name, folder):
    with pytest.raises(DataError, match=r"no such file of labels|can't be read as UTF-8 text"):
        read_label_file(folder, Path(name))


def test_a_class_in_two_spellings_of_unicode_is_one(folder):
    text = f"image,label,split\n{FIRST},{COMPOSED},train\n{SECOND},{DECOMPOSED},train\n"
    source = read(folder, f"{text}{THIRD},{DECOMPOSED},test\n")
    assert source.classes == (COMPOSED,)
    assert [part.labels.tolist() for part in source.splits.values()] == [[0, 0], [0]]
    assert source.splits["test"].strangers == ()


def test_half_of_a_character_becomes_a_question_mark(folder):
    rows = [{"image": FIRST, "label": "a\ud800"}, {"image": SECOND, "label": "b"}]
    source = read(folder, json.dumps(rows), "l.json")
    assert source.classes == ("a?", "b")
    "".join(source.classes).encode()


@pytest.mark.parametrize(
    "name",
    ["<b>&amp;</b>", "=SUM(A1)", "日本 語", "עברית", "a,b", 'say "x"', "a\nb", "$x^2$", "🦊"],
)
def test_any_text_is_a_class(name, folder):
    rows = [{"image": f"images/{i:03}.png", "label": name if i % 2 else "other"} for i in range(6)]
    (folder / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_data(str(folder), labels="l.jsonl", validation=0, test=0)
    assert set(data.classes) == {name, "other"}
    assert data.train.labels.bincount().tolist() == [3, 3]
    cells = "".join(f'{FIRST[:-5]}{i}.png,"{quoted(name)}"\n' for i in range(2))
    assert read(folder, f"image,label\n{cells}").classes == (name,)


def quoted(name):
    return name.replace('"', '""')


# Cells


def test_numbers_truth_values_and_nothing_are_labels_as_they_are_written(folder):
    values = [1, "1", 1.5, True, None, float("nan")]
    rows = [{"image": f"images/{i:03}.png", "label": value} for i, value in enumerate(values)]
    found = labelled(read(folder, rows, "l.jsonl"))["train"]
    assert list(found.values()) == ["1", "1", "1.5", "True", -1, -1]


@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
def test_minus_one_is_no_label_but_where_training_has_it(folder):
    rows = [f"{FIRST},0,train", f"{SECOND},1,train", f"{THIRD},-1,test"]
    source = read(folder, "\n".join(["image,label,split", *rows]))
    assert source.classes == ("0", "1")
    assert (source.splits["test"].labels.tolist(), source.splits["test"].strangers) == ([-1], ())
    data = load_data(str(folder), labels="labels.csv", validation=0, test=0)
    assert data.test_count == 0  # it is left out
    signs = read(folder, "\n".join(["image,label,split", *rows, "images/003.png,-1,train"]))
    assert signs.classes == ("-1", "0", "1")
    assert signs.splits["test"].labels.tolist() == [0]


def test_a_label_of_several_values_is_refused_with_its_entry(folder):
    for value in ([1], {"a": 1}):
        rows = [{"image": FIRST, "label": "a"}, {"image": SECOND, "label": value}]
        with pytest.raises(DataError, match=r"l\.json, entry 2: a cell holds several values"):
            read(folder, json.dumps(rows), "l.json")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f'image,label\n{FIRST},a\n{SECOND},"b"c\n', 3),
        (f"image,label\n{FIRST},a\n\n{SECOND},b,c\n", 4),
        (f'image,label\n{FIRST},"a\nb"\n{SECOND}\n', 4),
        (f"image,label\n{FIRST},a\n{SECOND},{'b' * 200_000}\n", 3),
    ],
)
def test_the_line_of_a_fault_counts_empty_and_broken_lines(text, line, folder):
    with pytest.raises(DataError, match=rf"labels\.csv, line {line}: "):
        read(folder, text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_lines_may_end_as_on_any_system(end, delimiter, folder):
    rows = (("image", "label"), (FIRST, "a b"), (SECOND, "c.d"))
    text = end.join(delimiter.join(row) for row in rows)
    assert labelled(read(folder, text))["train"] == {"000.png": "a b", "001.png": "c.d"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("null", "not JSON, or not a list or lines of it"),
        ('{"image": "x"}', "entry 1: expected an object"),
        ('"images"', "entry 1: expected an object"),
        ("[]", "holds no images; expected column names"),
        ("[" * 100_000, "not JSON, or not a list"),
        ("[{}]", "name its column with data.image_column: none has a usual name"),
    ],
)
def test_json_of_another_kind_is_refused(content, said, folder):
    with pytest.raises((DataError, UsageError), match=re.escape(said)):
        read(folder, content, "l.json")


def test_an_image_column_alone_has_no_label(folder):
    with pytest.raises(UsageError, match=r"data\.label: none has a usual name; there are image"):
        read(folder, f"image\n{FIRST}\n")


def test_rows_of_json_may_lack_columns_of_others(folder):
    rows = [{"note": 1, "image": FIRST, "label": "a"}, {"image": SECOND, "label": "b", "more": []}]
    assert labelled(read(folder, rows, "l.jsonl"))["train"] == {"000.png": "a", "001.png": "b"}
    with pytest.raises(DataError, match="line 2: names no image"):
        read(folder, [*rows[:1], {"label": "b"}], "l.jsonl")


def test_a_file_of_labels_has_a_fingerprint_of_its_images(folder):
    text = f"image,label\n{FIRST},a\n{SECOND},b\n"
    before = read(folder, text).splits["train"].fingerprint
    assert read(folder, text).splits["train"].fingerprint == before
    other = read(folder, text.replace(SECOND, THIRD)).splits["train"].fingerprint
    assert other != before


def test_a_list_in_a_cell_is_no_class(folder):
    with pytest.raises(DataError, match=r"line 3: a cell holds several values"):
        read(folder, f"image,label\n{FIRST},a\n{SECOND},['cat']\n")
    assert read(folder, f"image,label\n{FIRST},[a]\n{SECOND},b\n").classes == ("[a]", "b")


def test_a_name_without_an_extension_finds_capital_ones(folder):
    (folder / FIRST).rename(folder / "images" / "IMG_0.PNG")
    found = read(folder, f"image,label\nimages/IMG_0,a\n{SECOND},b\n")
    assert [*labelled(found)["train"]] == ["IMG_0.PNG", "001.png"]


def test_separators_in_quoted_names_of_columns_do_not_count(folder):
    text = f'"image, relative, to, here";label\n{FIRST};a\n{SECOND};b\n'
    columns = LabelColumns("image, relative, to, here")
    assert read(folder, text, columns=columns).classes == ("a", "b")
