"""Parquet files of some kilobytes that decode to gigabytes."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import numbers, picture, write_parquet_shards

from smallfry.data import load_data, parquet_bounds, shards
from smallfry.data.parquet_bounds import Decoded, decoded_size, open_bounded, rows_at_once
from smallfry.data.shard_index import find_shards, read_shards
from smallfry.errors import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MIB = 2**20


def write(file, images, labels=None, kind=None, **options) -> None:
    cells = pa.array([{"bytes": image, "path": None} for image in images], IMAGE)
    labels = pa.array([i % 3 for i in range(len(images))] if labels is None else labels, kind)
    pq.write_table(pa.table({"image": cells, "label": labels}), file, compression="zstd", **options)


MEASURE = """
import sys, datasets, torch, smallfry.data.shard_index
from smallfry.data import load_data
from smallfry.errors import DataError
datasets.disable_progress_bars()
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak()
try:
    data = load_data(sys.argv[1], stream=sys.argv[2] == "stream", image_size=8)
    data.train.pixels[torch.arange(len(data.train.pixels.shape))]
    print("read")
except DataError as error:
    print(error)
print(peak() - before)
"""


def measured(folder, way) -> tuple[str, float]:
    """What was said of a folder, and by how many MiB memory grew meanwhile."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(folder), way],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "SMALLFRY_CACHE": f"{folder}/cache",
            "HF_DATASETS_CACHE": f"{folder}/datasets",
        },
    )
    assert done.returncode == 0, done.stderr
    said, grown = done.stdout.splitlines()
    return said, int(grown) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("way", ["whole", "stream"])
@pytest.mark.parametrize("what", ["image", "label"])
def test_cells_that_decode_to_gigabytes_are_read_in_little_memory_or_refused(way, what, tmp_path):
    large = 26 * MIB
    file = tmp_path / "train-0.parquet"
    if what == "image":
        write(file, [bytes(large)] * 40)
    else:
        write(file, [picture(i) for i in range(40)], ["x" * large] * 40, pa.string())
    assert file.stat().st_size < 50_000
    said, grown = measured(tmp_path, way)
    if what == "label" and way == "stream":
        assert "one class" in said or said == "read"
    elif way == "stream":
        assert "row 0: not an image" in said or "not an image" in said
    else:
        assert "GB, over 100 times the file" in said
        assert "--data.stream true" in said
    assert grown < 400  # decoded they take over 1,000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("way", ["whole", "stream"])
def test_a_dictionary_that_unpacks_to_much_is_refused_before_it_is_read(way, tmp_path):
    file = tmp_path / "train-0.parquet"
    write(file, [bytes(64 * MIB) + bytes([i]) for i in range(8)], dictionary_pagesize_limit=2**30)
    assert file.stat().st_size < 50_000
    said, grown = measured(tmp_path, way)
    assert "train-0.parquet: row group 0 unpacks to 0.5 GB, over 100 times the file" in said
    assert grown < 100  # it takes over 2,000


def test_row_groups_that_are_packed_too_tightly_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "train-0.parquet"
    write(file, [*map(picture, range(9)), *(bytes(200_000) + bytes([i]) for i in range(9))])
    open_bounded(file, ["image"]).close()
    monkeypatch.setattr(parquet_bounds, "MOST_UNPACKED", MIB)
    for way in (False, True):
        with pytest.raises(DataError, match=r"row group 0 unpacks to 0\.0 GB, over 100 times"):
            load_data(str(tmp_path), stream=way)
    monkeypatch.setattr(parquet_bounds, "MOST_EXPANSION", 10_000)
    open_bounded(file, ["image"]).close()


def test_a_cell_of_more_than_100_mb_is_refused_and_its_rows_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_bounds, "MOST_BYTES", 10_000)
    write(tmp_path / "train-0.parquet", [*map(picture, range(20)), bytes(10_001)])
    with pytest.raises(DataError, match=r"train-0.parquet: rows 0 to 20 hold a cell of 0 MB"):
        load_data(str(tmp_path), stream=False)


def test_other_columns_are_not_read(tmp_path):
    write(tmp_path / "train-0.parquet", [picture(i) for i in range(20)])
    table = pq.read_table(tmp_path / "train-0.parquet")
    table = table.append_column("notes", pa.array([bytes(3 * MIB)] * 20))
    table = table.append_column("vectors", pa.array([[0.0] * 1000] * 20))
    pq.write_table(table, tmp_path / "train-0.parquet", compression="zstd")
    columns = ["image", "label"]
    assert rows_at_once([tmp_path / "train-0.parquet"], columns) == 1000
    assert rows_at_once([tmp_path / "train-0.parquet"], [*columns, "notes"]) == 64 // 3
    data = load_data(str(tmp_path), stream=False, test=0.0, validation=0.0)
    assert numbers(data.train.images) == list(range(20))


def test_lists_and_too_many_rows_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "train-0.parquet"
    cells = pa.array([[picture(i)] for i in range(9)], pa.list_(pa.binary()))
    pq.write_table(pa.table({"image": cells, "label": list(range(9))}), file)
    with pytest.raises(DataError, match="its column 'image' holds lists"):
        open_bounded(file, ["image"])
    open_bounded(file, ["label"]).close()
    monkeypatch.setattr(parquet_bounds, "MOST_ROWS", 8)
    write(file, [picture(i) for i in range(9)])
    for way in (False, True):
        with pytest.raises(DataError, match="has 9 rows, more than the limit of 8"):
            load_data(str(tmp_path), stream=way)


def test_damaged_files_and_lacking_columns_are_left_to_the_reader(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1 and then nothing")
    assert rows_at_once([file], ["image"]) == 1000
    write(file, [picture(0)])
    assert rows_at_once([file], ["other"]) == 1000
    content = file.read_bytes()
    file.write_bytes(content[:60] + bytes(40) + content[100:])
    assert rows_at_once([file], ["image", "label"]) == 1000


def test_sizes_are_those_of_the_decoded_cells():
    texts = pa.array(["a", "bcd", None, "bcd"])
    assert decoded_size(texts) == Decoded(7, 3)
    assert decoded_size(texts.dictionary_encode()) == Decoded(7, 3)
    assert decoded_size(
        pa.chunked_array([texts, texts.dictionary_encode().dictionary_decode()])
    ) == (Decoded(14, 3))
    assert decoded_size(pa.chunked_array([], pa.string())) == Decoded(0, 0)
    cells = pa.array([{"bytes": b"12345", "path": "x"}, {"bytes": b"1", "path": None}, None], IMAGE)
    assert decoded_size(cells) == Decoded(7, 6)
    assert decoded_size(pa.array([1, 2])).total == 16


def test_equal_images_are_in_memory_once(tmp_path):
    write(tmp_path / "train-0.parquet", [bytes(MIB)] * 100)
    split = read_shards(tmp_path, find_shards(tmp_path)).splits["train"]
    reader = shards.ShardReader(split.shards)
    assert reader.read_one(99) == bytes(MIB)
    (held,) = reader._held.values()
    assert held.cells.nbytes < 2 * MIB


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_batch_is_read_in_parts_of_bounded_size(kind, tmp_path, monkeypatch):
    from shard_files import WRITERS

    WRITERS[kind](tmp_path, [9, 9])
    split = read_shards(tmp_path, find_shards(tmp_path)).splits["train"]
    reader = shards.ShardReader(split.shards)
    rows = np.array([17, 3, 3, 0, 9, 12, 5])
    whole = [reader.read_one(int(row)) for row in rows]
    monkeypatch.setattr(shards, "WINDOW_BYTES", 2 * max(map(len, whole)))
    parts = list(reader.read_in_parts(rows))
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert sorted(i for part in parts for i, _ in part) == list(range(7))
    assert reader.read(rows) == whole
    monkeypatch.setattr(shards, "WINDOW_BYTES", 1)
    assert [len(part) for part in reader.read_in_parts(rows)] == [1] * 7
    train = load_data(str(tmp_path), stream=True, test=0.0, validation=0.0).train
    assert numbers(train.pixels[train.rows]) == list(range(18))


def test_shards_are_decoded_the_same_as_before(tmp_path):
    write_parquet_shards(tmp_path, [9, 9])
    for way in (False, True):
        data = load_data(str(tmp_path), stream=way, test=0.0, validation=0.0)
        assert numbers(data.train.images) == list(range(18))
        assert data.train.labels.tolist() == [i % 3 for i in range(18)]
