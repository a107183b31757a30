"""Labels in CSV and JSON-lines files, in data sets, runs and evaluations."""

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import yaml
from image_files import write_images

from smallfry.cli import main
from smallfry.data import load_data
from smallfry.data.label_files import LabelColumns, read_label_file
from smallfry.errors import DataError, SmallfryWarning, UsageError
from smallfry.training.config import DataConfig, TrainConfig, read_config

TINY = (
    "--model.options={embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}"
)


@pytest.fixture
def folder(tmp_path):
    """A folder of 24 images in a subfolder, without labels."""
    write_images(tmp_path / "set" / "images", 24)
    return tmp_path / "set"


def rows_of(count=24, start=0):
    return [(f"images/{i:03}.png", "cat" if i % 3 else "dog") for i in range(start, start + count)]


def write_csv(folder, rows, head="image,label", name="labels.csv"):
    (folder / name).write_text("\n".join([head, *(",".join(row) for row in rows)]) + "\n")
    return folder


def labelled(source, split="train"):
    part = source.splits[split]
    names = [source.classes[label] if label >= 0 else label for label in part.labels.tolist()]
    return {Path(part.locate(i)).name: name for i, name in enumerate(names)}


def test_images_have_the_labels_of_their_rows(folder):
    rows = rows_of()
    write_csv(folder, reversed(rows))
    source = read_label_file(folder, Path("labels.csv"))
    assert source.classes == ("cat", "dog")
    assert labelled(source) == {Path(name).name: label for name, label in rows}
    data = load_data(str(folder), labels="labels.csv", validation=0.2, test=0.2)
    assert data.classes == ("cat", "dog")
    assert len(data.train) + len(data.validation) + data.test_count == 24
    for i, label in enumerate(data.train.labels.tolist()):
        name = Path(data.locate("train", i)).name
        assert dict(rows)[f"images/{name}"] == data.classes[label]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "\ufefffile;breed\r\nimages/000.png;collie\r\nimages/001;pug\r\n"),
        ("l.csv", ",image,breed\n0,images/000.png,collie\n1,images/001.png,pug\n"),
        ("l.csv", "Unnamed: 0,file,breed\n7,images/000.png,collie\n9,images/001.png,pug\n"),
        ("l.tsv", "id\tbreed\n000\tcollie\n001\tpug\n"),
        ("l.csv", 'image , label \n"images/000.png", collie\nimages/001.png,pug\n'),
        ("l.jsonl", '{"path": "000.png", "y": "collie"}\n\n{"path": "001", "y": "pug"}'),
        ("l.json", '[{"id": "000.png", "y": "collie"}, {"id": "001.png", "y": "pug"}]'),
    ],
)
def test_files_of_all_kinds_are_read_alike(name, text, folder):
    place = folder / ("images" if "images" not in text else "") / name
    place.write_text(text, newline="")
    source = read_label_file(folder, place.relative_to(folder))
    assert labelled(source) == {"000.png": "collie", "001.png": "pug"}


def test_columns_and_splits_are_chosen_by_name(folder):
    parts = ["train"] * 12 + ["VAL"] * 6 + ["test"] * 6
    rows = [(*row, "x", part) for row, part in zip(rows_of(), parts, strict=True)]
    write_csv(folder, rows, "image,animal,label,split")
    source = read_label_file(folder, Path("labels.csv"))
    assert source.classes == ("x",)
    source = read_label_file(folder, Path("labels.csv"), LabelColumns(label="animal"))
    assert {split: len(part.labels) for split, part in source.splits.items()} == {
        **{"train": 12, "validation": 6, "test": 6}
    }
    data = load_data(str(folder), labels="labels.csv", label="animal")
    assert (len(data.train), len(data.validation), data.test_count) == (12, 6, 6)
    renamed = [(*row[:3], "train" if row[3] == "VAL" else row[3]) for row in rows]
    write_csv(folder, renamed, "image,animal,label,part")
    columns = LabelColumns("image", "animal", "part")
    source = read_label_file(folder, Path("labels.csv"), columns)
    assert {split: len(part.labels) for split, part in source.splits.items()} == {
        **{"train": 18, "test": 6}
    }


def test_numbers_are_names_of_classes_in_order(folder):
    lines = [{"image": f"images/{i:03}.png", "label": i % 12} for i in range(24)]
    (folder / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = read_label_file(folder, Path("l.jsonl"))
    assert set(source.classes) == {str(i) for i in range(12)}
    assert labelled(source)["011.png"] == "11"


def test_images_without_labels_and_of_unknown_classes_are_treated_as_in_other_data(folder):
    rows = [(*row, "train") for row in rows_of(18)]
    rows += [("images/018.png", "", "test"), ("images/019.png", "", "test")]
    write_csv(folder, rows, "image,label,split")
    with pytest.warns(SmallfryWarning, match="test split has no labels and is left out"):
        data = load_data(str(folder), labels="labels.csv")
    assert len(data.train) + len(data.validation) + data.test_count == 18
    rows[-1] = ("images/019.png", "cow", "test")
    rows[-2] = ("images/018.png", "cat", "test")
    write_csv(folder, rows, "image,label,split")
    with pytest.warns(SmallfryWarning, match="1 of 2 test images are of cow, not among"):
        assert load_data(str(folder), labels="labels.csv").test_count == 1
    rows[0] = ("images/000.png", "", "train")
    write_csv(folder, rows, "image,label,split")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"000\.png: label -1 is missing"):
            load_data(str(folder), labels="labels.csv")


def test_images_that_are_not_listed_are_counted(folder, caplog):
    write_csv(folder, rows_of(20))
    with caplog.at_level(logging.INFO):
        read_label_file(folder, Path("labels.csv"))
    assert "ignored 4 images that labels.csv does not list" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,label\n", "holds no images"),
        ("", "holds no images"),
        ("image,label\nimages/000.png\n", "line 2: 2 cells were expected"),
        ("image,label\nimages/000.png,a,b\n", "line 2: 2 cells were expected"),
        ('image,label\n"images/000.png,a\n', "not CSV"),
        ("image,image\na,b\n", "two columns have one name: image, image"),
        ("image,label\nimages/999.png,a\n", "line 2: no image 'images/999.png' in"),
        ("image,label\n../outside.png,a\n", "line 2: '../outside.png' is outside"),
        ("image,label\n/etc/hostname,a\n", "line 2: '/etc/hostname' is outside"),
        ("image,label\n,a\n", "line 2: names no image"),
        ("image,label\nimages/000.png,a\n./images/000.png,b\n", "has a row before"),
        ("image,label,split\nimages/000.png,a,fold1\n", "unknown split 'fold1'; expected one of"),
        ("image,label,split\nimages/000.png,a,test\n", "no row is of the train split"),
    ],
)
def test_the_line_of_a_fault_is_named(text, said, folder):
    write_images(folder.parent, 1)
    (folder.parent / "000.png").rename(folder.parent / "outside.png")
    (folder / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(said)):
        read_label_file(folder, Path("labels.csv"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("l.jsonl", b"{", "not JSON"),
        ("l.jsonl", b"[1]\n", "line 1: expected an object"),
        ("l.json", b"5", "not JSON, or not a list"),
        ("l.jsonl", b'{"image": "images/000.png", "label": ["a", "b"]}', "holds several values"),
        ("l.csv", b"\xff\xfe\x00", "can't be read as UTF-8 text"),
    ],
)
def test_files_of_another_kind_are_refused(name, content, said, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(said)):
        read_label_file(folder, Path(name))


def test_columns_that_could_be_meant_are_listed(folder):
    write_csv(folder, [("images/000.png", "a", "b")], "image,class,target")
    with pytest.raises(
        UsageError, match=r"data\.label: class and target could be it; there are im"
    ):
        read_label_file(folder, Path("labels.csv"))
    write_csv(folder, [("images/000.png", "a", "b")], "photo_of,x,y")
    with pytest.raises(UsageError, match=r"data\.image_column: none has a usual name; there are"):
        read_label_file(folder, Path("labels.csv"))
    write_csv(folder, rows_of())
    for option, columns in {
        "label": LabelColumns(label="lable"),
        "image_column": LabelColumns(image="images"),
        "split_column": LabelColumns(split="part"),
    }.items():
        with pytest.raises(UsageError, match=rf"data\.{option}: .* has no column '\w+'"):
            read_label_file(folder, Path("labels.csv"), columns)


def test_settings_that_do_not_go_together_are_refused(folder):
    with pytest.raises(UsageError, match=r"data\.split_column is of the file data\.labels"):
        DataConfig(str(folder), split_column="split")
    with pytest.raises(UsageError, match="'digits' is neither a folder nor a known"):
        load_data("digits", labels="labels.csv")
    with pytest.raises(DataError, match=r"no such file of labels; data\.labels is relative to"):
        load_data(str(folder), labels="nothing.csv")
    write_csv(folder, rows_of())
    with pytest.raises(UsageError, match=r"data\.stream needs a folder of parquet or tar files"):
        load_data(str(folder), labels="labels.csv", stream=True)


@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
def test_the_command_trains_resumes_evaluates_and_predicts(folder, tmp_path, capsys):
    write_csv(folder, rows_of())
    run = tmp_path / "run"
    options = [TINY, "--epochs=1", "--batch_size=8", "--references=false", "--progress=quiet"]
    asked = ["--data", str(folder), "--data.labels", "labels.csv", "--run", str(run)]
    assert main(["train", *asked, *options]) == 0
    moved = folder.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(moved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "test"
    write_images(tmp_path / "other" / "images", 6, seed=5)
    write_csv(tmp_path / "other", rows_of(6))
    assert main(["evaluate", str(run), "--data", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert main(["train", "--resume", str(run), "--data", str(moved), "--epochs", "2"]) == 0


def test_a_file_in_a_subfolder_names_images_beside_it_or_in_the_folder(folder):
    write_images(folder / "more", 3, seed=8)
    rows = [("000.png", "a"), ("more/001.png", "b")]
    write_csv(folder, rows, name="more/labels.csv")
    source = read_label_file(folder, Path("more/labels.csv"))
    assert [source.splits["train"].locate(i) for i in range(2)] == [
        str(folder / "more" / "000.png"),
        str(folder / "more" / "001.png"),
    ]


def test_the_settings_are_written_and_read_again(folder, tmp_path):
    config = TrainConfig(
        data=DataConfig(str(folder), labels="l.csv", image_column="photo", split_column="fold")
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    again = read_config(tmp_path / "config.yaml").data
    assert (again.labels, again.image_column, again.split_column) == (
        Path("l.csv"),
        "photo",
        "fold",
    )
