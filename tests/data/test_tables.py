"""Tables of images: parquet files, their columns and their labels."""

import io
import unicodedata
from datetime import date
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import grey, write_images, write_parquet
from shard_files import numbers, picture, write_parquet_shards

from smallfry.data import load_data
from smallfry.errors import DataError, SmallfryWarning, UsageError


def test_parquet_shards_with_named_labels(tmp_path):
    write_parquet(tmp_path, "train", grey(20), [0, 1] * 10, names=["no", "yes"])
    write_parquet(tmp_path, "test", grey(4), [0, 1] * 2, names=["no", "yes"])
    data = load_data(str(tmp_path))
    assert data.classes == ("no", "yes")
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 4)
    assert data.channels == 1


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("data-train.parquet", "data_test.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("train.parquet", "data/test.parquet"),
    ],
)
def test_the_split_of_a_shard_is_found_wherever_its_name_says_it(tmp_path, names):
    for split, count, name in (("train", 20, names[0]), ("test", 4, names[1])):
        write_parquet(tmp_path, split, grey(count), [0, 1] * (count // 2), names=["no", "yes"])
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        (tmp_path / f"{split}-00000-of-00001.parquet").rename(place)
    data = load_data(str(tmp_path))
    assert (len(data.train) + len(data.validation), len(data.test)) == (20, 4)


def test_a_shard_of_no_known_split_beside_others_is_refused(tmp_path):
    write_parquet(tmp_path, "train", grey(20), [0, 1] * 10, names=["no", "yes"])
    write_parquet(tmp_path, "extra", grey(20), [0, 1] * 10, names=["no", "yes"])
    with pytest.raises(DataError, match=r"extra-00000-of-00001.parquet: unknown split"):
        load_data(str(tmp_path))


def test_class_names_in_another_order_in_the_test_split_are_matched_by_name(tmp_path):
    write_parquet(tmp_path, "train", grey(20), [0, 1] * 10, names=["no", "yes"])
    write_parquet(tmp_path, "test", grey(3), [0, 0, 1], names=["yes", "no"])
    data = load_data(str(tmp_path))
    assert data.classes == ("no", "yes")
    assert data.test.labels.tolist() == [1, 1, 0]


def test_images_in_files_beside_a_table_are_read_anew(tmp_path):
    write_images(tmp_path / "pictures", 20, mode="L")
    files = [str(tmp_path / "pictures" / f"{i:03}.png") for i in range(20)]
    cells = [{"bytes": None, "path": file} for file in files]
    write_parquet(tmp_path, "train", cells, [0, 1] * 10, names=["no", "yes"])
    kept = tmp_path / "train-00000-of-00001.parquet"
    table = pq.read_table(kept)
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(table.set_column(0, "picture", column), kept)
    before = load_data(str(tmp_path)).train.images
    write_images(tmp_path / "pictures", 20, mode="L", seed=9)
    assert not torch.equal(load_data(str(tmp_path)).train.images, before)


def test_parquet_with_labels_as_text(tmp_path):
    write_parquet(tmp_path, "train", grey(20), ["b", "a"] * 10)
    assert load_data(str(tmp_path)).classes == ("a", "b")


def test_test_images_of_a_label_that_training_lacks_are_left_out_and_told(tmp_path):
    write_parquet(tmp_path, "train", grey(20), ["b", "a"] * 10)
    write_parquet(tmp_path, "test", grey(3), ["b", "c", "a"])
    with pytest.warns(SmallfryWarning, match="1 of 3 test images are of c, not among the training"):
        data = load_data(str(tmp_path))
    assert data.test.labels.tolist() == [1, 0]


def test_several_label_columns_need_a_choice(tmp_path):
    write_parquet(tmp_path, "train", grey(20), [0, 1] * 10, names=["no", "yes"], colour=[0, 1] * 10)
    with pytest.raises(DataError, match=r"unclear which column is the label, of label, colour"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), label="colour").classes == ("x", "y")
    with pytest.raises(UsageError, match="no column 'color' for labels; did you mean 'colour'"):
        load_data(str(tmp_path), label="color")


def test_a_label_without_an_image_is_named(tmp_path):
    images = grey(20)
    images[7] = None
    write_parquet(tmp_path, "train", images, [0, 1] * 10, names=["no", "yes"])
    with pytest.raises(DataError, match="train row 7: a label without an image"):
        load_data(str(tmp_path))


def test_an_image_without_a_label_is_named(tmp_path):
    labels = [0, 1] * 10
    labels[3] = None
    write_parquet(tmp_path, "train", grey(20), labels, names=["no", "yes"])
    with pytest.raises(DataError, match="train row 3: label -1 is missing or outside 0 to 1"):
        load_data(str(tmp_path))


def test_a_class_name_without_images_is_told(tmp_path):
    write_parquet(tmp_path, "train", grey(20), [0, 1] * 10, names=["no", "yes", "maybe"])
    with pytest.warns(SmallfryWarning, match="maybe: no training image"):
        assert len(load_data(str(tmp_path)).classes) == 3


def write_table(folder: Path, split: str, **columns) -> None:
    pq.write_table(pa.table(columns), folder / f"{split}-0.parquet")


def encoded(count: int) -> list[bytes]:
    return [picture(i) for i in range(count)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "img", "whatever"])
def test_a_column_of_bytes_holds_images_as_pandas_writes_them(tmp_path, stream, kind, name):
    write_table(tmp_path, "train", **{name: pa.array(encoded(30), kind), "label": [0, 1, 2] * 10})
    data = load_data(str(tmp_path), stream=stream, validation=0.0)
    seen = numbers(data.train.images) + numbers(data.test.images)
    assert sorted(seen) == list(range(30))
    labels = torch.cat([data.train.labels, data.test.labels]).tolist()
    assert labels == [number % 3 for number in seen]


@pytest.mark.parametrize("stream", [False, True])
def test_of_several_columns_of_bytes_the_one_that_is_named_so_is_the_image(tmp_path, stream):
    columns = {"label": [0, 1, 2] * 10, "thumbnail": [b"x"] * 30}
    write_table(tmp_path, "train", **columns, image=encoded(30))
    assert len(load_data(str(tmp_path), stream=stream).classes) == 3
    write_table(tmp_path, "train", **columns, large=encoded(30))
    with pytest.raises(DataError, match=r"which column holds the images, .*thumbnail, large"):
        load_data(str(tmp_path), stream=stream)


def test_a_null_in_a_column_of_bytes_is_named(tmp_path):
    write_table(tmp_path, "train", image=[None, *encoded(29)], label=[0, 1, 2] * 10)
    with pytest.raises(DataError, match="train row 0: a label without an image"):
        load_data(str(tmp_path))


def test_a_table_without_images_says_what_it_has(tmp_path):
    write_table(tmp_path, "train", image=["a.png"] * 4, label=[0, 1] * 2)
    with pytest.raises(
        DataError, match=r"no column holds images, .*image \(string\), label \(int64"
    ):
        load_data(str(tmp_path))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("withheld", [-1, None])
@pytest.mark.parametrize("names", [["cat", "dog", "owl"], None])
def test_a_test_split_whose_labels_are_withheld_is_told_and_not_taken(
    tmp_path, names, withheld, stream
):
    write_parquet_shards(tmp_path, [30], names=names)
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = [{"bytes": picture(40), "path": None}] * 4
    table = datasets.Dataset.from_dict({"image": rows, "label": [withheld] * 4}, features)
    table.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    with pytest.warns(SmallfryWarning, match="its test split has no labels and is left out"):
        data = load_data(str(tmp_path), stream=stream)
    assert 40 not in numbers(data.test.images)
    assert len(data.test) == 6
    assert data.test.labels.min() >= 0


@pytest.mark.parametrize("stream", [False, True])
def test_one_withheld_label_among_others_is_named(tmp_path, stream):
    write_parquet_shards(tmp_path, [30])
    write_parquet_shards(tmp_path, [4], split="test", first=40)
    file = next(tmp_path.glob("test-*"))
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, "label", pa.array([0, -1, 1, 2])), file)
    with pytest.raises(DataError, match="row 1: label -1 is missing"):
        _ = load_data(str(tmp_path), stream=stream).test


@pytest.mark.parametrize("stream", [False, True])
def test_labels_as_text_may_be_spelled_in_two_ways(tmp_path, stream):
    label = [unicodedata.normalize(f, w) for f in ("NFC", "NFD") for w in ("café", "thé")]
    write_table(tmp_path, "train", image=encoded(20), label=label * 5)
    write_table(tmp_path, "test", image=encoded(4), label=label[::-1])
    data = load_data(str(tmp_path), stream=stream)
    assert data.classes == tuple(label[:2])
    assert data.test.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("name", ["Train", "TRAINING"])
def test_folders_of_shards_may_be_written_in_any_case(tmp_path, name):
    write_parquet_shards(tmp_path / name, [30], split="part")
    write_parquet_shards(tmp_path / "Val", [3], split="part", first=40)
    data = load_data(str(tmp_path))
    assert (len(data.train) + len(data.test), len(data.validation)) == (30, 3)


@pytest.mark.parametrize(("one", "other"), [("val", "validation"), ("train", "Train")])
def test_shards_of_one_split_under_two_names_are_refused(tmp_path, one, other):
    for number, split in enumerate(dict.fromkeys(("train", one, other))):
        write_parquet_shards(tmp_path, [3], split=split, first=3 * number)
    with pytest.raises(DataError, match="are both the"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_of_parts_is_a_table_as_spark_writes_it(tmp_path, stream):
    for split, number in {"train": 30, "test": 3}.items():
        write_parquet_shards(tmp_path / f"{split}.parquet", [number], split="part")
        (tmp_path / f"{split}.parquet" / "_SUCCESS").touch()
    data = load_data(str(tmp_path), stream=stream)
    assert (len(data.train) + len(data.validation), len(data.test)) == (30, 3)


def test_a_label_that_is_not_a_number_is_missing(tmp_path):
    write_table(tmp_path, "train", image=encoded(20), label=[0.0, 1.0] * 9 + [0.0, float("nan")])
    with pytest.raises(DataError, match="train row 19: label -1 is missing"):
        load_data(str(tmp_path))


def test_labels_of_several_classes_are_refused(tmp_path):
    write_table(tmp_path, "train", image=encoded(4), label=[[0], [1], [0, 1], []])
    with pytest.raises(
        DataError, match="its column 'label' holds lists; expected one image, or one class"
    ):
        load_data(str(tmp_path))


def test_hidden_copies_of_shards_are_not_meant(tmp_path):
    write_parquet_shards(tmp_path, [30])
    (tmp_path / "._train-00000-of-00001.parquet").write_bytes(b"a mac was here")
    assert len(load_data(str(tmp_path), test=0.0, validation=0.0).train) == 30


def test_damaged_parquet_is_refused(tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="parquet files can't be read"):
        load_data(str(tmp_path))


def test_the_test_split_is_not_read_before_it_is_asked_for(tmp_path):
    write_parquet(tmp_path, "train", grey(20), [0, 1] * 10, names=["no", "yes"])
    write_parquet(tmp_path, "test", [None, *grey(1)], [0, 1], names=["no", "yes"])
    data = load_data(str(tmp_path))
    with pytest.raises(DataError, match="test row 0"):
        _ = data.test


def write_raw(folder, labels):
    """A table of encoded images and labels, without the description that ``datasets`` adds."""
    encoded = []
    for image in grey(len(labels)):
        stream = io.BytesIO()
        image.save(stream, "png")
        encoded.append(stream.getvalue())
    pq.write_table(pa.table({"image": encoded, "label": labels}), folder / "train.parquet")


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([True, False], ("False", "True")),
        ([2.5, 1.0], ("1.0", "2.5")),
        ([12, 2], ("2", "12")),
        (["12", "2"], ("12", "2")),
    ],
)
def test_labels_of_every_kind_are_the_same_streamed(values, classes, tmp_path):
    write_raw(tmp_path, values * 10)
    whole, streamed = (load_data(str(tmp_path), stream=each) for each in (False, True))
    assert whole.classes == streamed.classes == classes
    assert whole.train.labels.tolist() == streamed.train.labels.tolist()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("values", [[date(2026, 1, 1), date(2026, 1, 2)], [b"a", b"b"]])
def test_labels_that_are_no_numbers_or_texts_are_refused(values, stream, tmp_path):
    write_raw(tmp_path, values * 10)
    with pytest.raises(DataError, match=r"no numbers or texts|missing or not a number or text"):
        load_data(str(tmp_path), stream=stream, label="label", image_column="image")
