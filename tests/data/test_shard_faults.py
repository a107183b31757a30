"""Shards that are empty, joined or changed, and disks that fail for a moment."""

import errno
import io
import os
import tarfile
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import WRITERS, add, numbers, picture, write_parquet_shards, write_tar_shards

from smallfry.data import load_data, parquet_shards, stream, tar_shards
from smallfry.data.stream import ShardPixels
from smallfry.errors import AccessError, DataError, SmallfryWarning
from smallfry.training.augment import Augment
from smallfry.training.batches import TrainBatches
from smallfry.training.config import AugmentConfig
from smallfry.training.loader import TrainLoader

TABLE = pa.schema([("image", pa.struct([("bytes", pa.binary())])), ("label", pa.int64())])


def load(folder, **options):
    wanted = {"test": 0.0, "validation": 0.0, "image_size": 8, "channels": 1} | options
    return load_data(str(folder), stream=True, **wanted)


# Shards and row groups without a row


def write_groups(folder, layout):
    """Parquet shards, given the sizes of the row groups of each; the number of their rows."""
    row = 0
    for number, groups in enumerate(layout):
        with pq.ParquetWriter(folder / f"train-{number:05}.parquet", TABLE) as writer:
            for size in groups:
                cells = [{"bytes": picture(i)} for i in range(row, row + size)]
                labels = [i % 3 for i in range(row, row + size)]
                table = pa.table({"image": cells, "label": labels}, TABLE)
                writer.write_table(table, row_group_size=max(1, size))
                row += size
    return row


@pytest.mark.parametrize(
    "layout",
    [
        [[0], [3, 3], [3]],
        [[3, 3], [0], [3, 3]],
        [[3, 3], [3], [0]],
        [[3, 0], [3, 0, 0, 3], [3]],
        [[0, 3], [0], [0, 0, 3]],
        [[3], [], [3]],
    ],
    ids=["first", "middle", "last", "trailing group", "leading group", "no groups"],
)
def test_empty_row_groups_shift_no_label(layout, tmp_path):
    count = write_groups(tmp_path, layout)
    train = load(tmp_path).train
    assert numbers(train.images) == list(range(count))
    assert train.labels.tolist() == [i % 3 for i in range(count)]


def test_a_table_that_begins_with_an_empty_row_group_can_be_decoded_at_once(tmp_path):
    write_groups(tmp_path, [[0, 3], [3, 3]])
    data = load_data(str(tmp_path), stream=False, test=0.0, validation=0.0)
    assert numbers(data.train.images) == list(range(9))
    assert data.train.labels.tolist() == [0, 1, 2] * 3


def test_a_column_whose_name_is_no_text_is_damage(tmp_path):
    write_groups(tmp_path, [[6], [6]])
    file = tmp_path / "train-00001.parquet"
    content = file.read_bytes()
    assert b"label" in content
    file.write_bytes(content.replace(b"label", b"labe\xef"))
    with pytest.raises(DataError, match=r"00001\.parquet: not a whole parquet file"):
        load(tmp_path)
    with pytest.warns(SmallfryWarning, match="1 damaged shards"):
        assert numbers(load(tmp_path, skip_unreadable=True).train.images) == list(range(6))


def test_a_changed_byte_is_damage_or_leaves_cells_of_bytes(tmp_path):
    file = tmp_path / "train-00000.parquet"
    with pq.ParquetWriter(file, TABLE, compression="none") as writer:
        cells = [{"bytes": picture(i % 2)} for i in range(12)]
        writer.write_table(pa.table({"image": cells, "label": [i % 2 for i in range(12)]}, TABLE))
    content, refused = file.read_bytes(), 0
    labels = pq.read_metadata(file).row_group(0).column(1).dictionary_page_offset
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for place in range(footer):
        file.write_bytes(content[:place] + b"\2" + content[place + 1 :])
        try:  # what lies outside a dictionary is found before it is looked up
            cells = parquet_shards.read_group(file, 0, "image").to_pylist()
        except DataError:
            refused += 1
        else:
            assert all(cell is None or isinstance(cell, bytes) for cell in cells)
        if place >= labels:
            scanned = parquet_shards.scan(file, "image", "label")
            assert scanned.damage or len(scanned.codes) == 12
    assert refused > 20


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(0, 100),
)
def test_any_layout_gives_every_row_its_own_image_and_label(layout, window, seed):
    layout = [[1, 2], *layout, [0, 3]]
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLFRY_CACHE", f"{place}/cache")
        count = write_groups(Path(place), layout)
        train = load(place, window=window).train
        order = train.shuffled(torch.Generator().manual_seed(seed))
        assert sorted(order.tolist()) == list(range(count))
        taken = train.take(order)
        assert numbers(taken.images) == order.tolist()
        assert taken.labels.tolist() == [i % 3 for i in order.tolist()]
        assert set(train.pixels.shards.spread(train.rows.numpy(), 7).tolist()) <= set(range(count))
        for row in range(count):
            told = train.pixels.shards.locate(row)
            shard = int(told.split("-")[-1][:5])
            before = sum(map(sum, layout[:shard]))
            assert told.endswith(f"parquet row {row - before}")
            assert row - before < sum(layout[shard])


def test_tar_files_without_a_sample_shift_no_label(tmp_path):
    write_tar_shards(tmp_path, [0, 4, 0, 0, 5, 0])
    train = load(tmp_path).train
    assert numbers(train.images) == list(range(9))
    assert train.labels.tolist() == [i % 3 for i in range(9)]
    assert "train-000004.tar sample 0 ('000004.png')" in train.pixels.shards.locate(4)


# Disks that fail for a moment


@pytest.fixture(params=WRITERS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))
    WRITERS[kind](tmp_path / "s", [12, 12])
    return tmp_path / "s"


def failing(do, number, left):
    """``do``, which fails as long as there is a number in ``left``."""

    def fail(*args, **options):
        if left:
            left.pop()
            raise OSError(number, os.strerror(number))
        return do(*args, **options)

    return fail


FAULTS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize("skip", [False, True])
def test_a_disk_that_fails_while_shards_are_indexed_is_told_and_not_kept(
    kind, folder, number, skip, monkeypatch
):
    left = [1]
    if kind == "tar":
        monkeypatch.setattr(
            tar_shards._Headers, "read", failing(tar_shards._Headers.read, number, left)
        )
    else:
        monkeypatch.setattr(parquet_shards.pq, "ParquetFile", failing(pq.ParquetFile, number, left))
    with pytest.raises(AccessError, match=r"train-0.*can't be read now .*try again"):
        load(folder, skip_unreadable=skip)
    assert not left
    assert not list((folder.parent / "cache").glob("index-*/*"))
    assert numbers(load(folder, skip_unreadable=skip).train.images) == list(range(24))


def test_a_disk_that_fails_in_the_middle_of_a_tar_file_loses_no_sample(tmp_path, monkeypatch):
    write_tar_shards(tmp_path / "s", [12])
    read, calls = tar_shards._Headers.read, []

    def fail(self, size=-1):
        calls.append(size)
        if len(calls) == 20:
            raise OSError(errno.EIO, "Input/output error")
        return read(self, size)

    monkeypatch.setattr(tar_shards._Headers, "read", fail)
    with pytest.raises(AccessError, match="Input/output error"):
        load(tmp_path / "s", skip_unreadable=True)
    assert len(load(tmp_path / "s", skip_unreadable=True).train) == 12


@pytest.mark.parametrize("number", FAULTS)
def test_a_disk_that_fails_while_images_are_looked_at_leaves_none_out(
    kind, folder, number, monkeypatch
):
    left = [1]
    if kind == "tar":
        monkeypatch.setattr(tar_shards, "read_span", failing(tar_shards.read_span, number, left))
    else:
        load(folder)  # the index, which is not what fails here
        monkeypatch.setattr(parquet_shards.pq, "ParquetFile", failing(pq.ParquetFile, number, left))
    with pytest.raises(AccessError, match="can't be read now"):
        load(folder, skip_unreadable=True)
    assert not list((folder.parent / "cache").glob("*.json"))
    assert len(load(folder, skip_unreadable=True).train) == 24


def test_full_memory_makes_no_image_unreadable(folder, monkeypatch):
    decode, left = stream.decode, [1]

    def full(*args):
        if left:
            left.pop()
            raise DataError(": the image is damaged (MemoryError)") from MemoryError()
        return decode(*args)

    monkeypatch.setattr(stream, "decode", full)
    with pytest.raises(AccessError, match="free memory"):
        load(folder, skip_unreadable=True)
    assert len(load(folder, skip_unreadable=True).train) == 24


def test_a_disk_that_fails_leaves_nothing_out_of_what_is_held_out(tmp_path, monkeypatch):
    write_tar_shards(tmp_path, [12])
    write_tar_shards(tmp_path, [6], split="test", first=100)
    data = load(tmp_path, skip_unreadable=True)
    monkeypatch.setattr(tar_shards, "read_span", failing(tar_shards.read_span, errno.EIO, [1]))
    with pytest.raises(AccessError):
        _ = data.test
    assert len(data.test) == 6


def test_a_disk_that_fails_is_told_by_workers_in_one_line(tmp_path):
    write_tar_shards(tmp_path, [12])
    data = load(tmp_path)
    next(tmp_path.iterdir()).unlink()
    plain = AugmentConfig(crop_padding=0, flip=False, mixup=0.0, cutmix=0.0)
    augment = Augment(plain, 8, len(data.classes), (0.0,), (1 / 255,), flip=False)
    batches = TrainBatches(data.train, augment, 4, seed=0)
    with pytest.raises(AccessError, match=r"000000\.tar: can't be read now") as told:
        list(TrainLoader(batches, range(2), 1, pin_memory=False))
    assert len(str(told.value).splitlines()) == 1
    assert str(told.value).startswith(str(tmp_path))


def test_several_processes_look_for_unreadable_images_once(folder, monkeypatch):
    looked, look = [], ShardPixels._faults
    monkeypatch.setattr(ShardPixels, "_faults", lambda self: (looked.append(1), look(self))[1])
    pixels = load(folder).train.pixels
    threads = [threading.Thread(target=pixels.unreadable) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert looked == [1]


def test_what_is_unreadable_is_told_where_it_can_not_be_kept(folder, monkeypatch):
    pixels = load(folder).train.pixels
    (folder.parent / "file").touch()
    monkeypatch.setenv("SMALLFRY_CACHE", str(folder.parent / "file"))
    with pytest.raises(DataError, match=r"list of unreadable images can't be cached .*CACHE"):
        pixels.unreadable()


# Tar files that are joined, or that lie


@pytest.mark.parametrize("gap", [b"", bytes(512 * 7), bytes(2**21)])
def test_joined_tar_files_are_damaged_where_the_first_ends(gap, tmp_path):
    write_tar_shards(tmp_path / "parts", [7, 5])
    first, second = (file.read_bytes() for file in sorted((tmp_path / "parts").iterdir()))
    folder = tmp_path / "s"
    folder.mkdir()
    file = folder / "train-000000.tar"
    file.write_bytes(first + gap + second)
    with pytest.raises(DataError, match=r"more follows where its 7 samples end, .*--concatenate"):
        load(folder)
    with pytest.warns(SmallfryWarning, match="1 damaged shards"):
        assert numbers(load(folder, skip_unreadable=True).train.images) == list(range(7))
    file.write_bytes(first + gap)  # zeros are no damage
    assert numbers(load(folder).train.images) == list(range(7))


def negative(name, size):
    """A header that tells a length below zero in base 256, with a right checksum."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = (size % 2**96).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [-1, -5, -511, -5000, -(2**70)])
@pytest.mark.parametrize("name", ["x.png", "x.cls", "x.txt"])
def test_a_member_of_a_length_below_zero_is_damage(size, name, tmp_path):
    write_tar_shards(tmp_path, [3])
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    label = io.BytesIO()
    with tarfile.open(fileobj=label, mode="w") as archive:
        add(archive, "x.json", b'{"label": 1}')
    file.write_bytes(content[: 6 * 1024] + negative(name, size) + label.getvalue())
    with pytest.raises(DataError, match=r"000000\.tar: damaged after its sample [12]"):
        load(tmp_path)


def test_a_span_of_a_length_below_zero_is_not_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    with io.FileIO(tmp_path / "file") as file, pytest.raises(DataError, match="negative length"):
        tar_shards.read_span(file, 10, -5)


def test_an_image_is_read_whole_from_a_disk_that_gives_it_in_pieces(tmp_path):
    class Pieces(io.FileIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    (tmp_path / "file").write_bytes(bytes(range(100)))
    with Pieces(tmp_path / "file") as file:
        assert tar_shards.read_span(file, 10, 50) == bytes(range(10, 60))


# Shards that change between two runs


def rewritten(folder, kind, change):
    """A shard of one large and 23 small images, with one or none changed, all of one length."""
    folder.mkdir()
    images = [bytes([i]) * 100 for i in range(24)]
    images[7] = os.urandom(20_000) if change == "different bytes" else b"\1" * 20_000
    if change == "another image":
        images[3] = b"\xff" * 100
    if kind == "tar":
        with tarfile.open(folder / "train.tar", "w") as archive:
            for i, image in enumerate(images):
                member = tarfile.TarInfo(f"{i:03}.png")
                member.size = len(image)
                member.mtime = 5 if (change, i) == ("another time", 9) else 0
                archive.addfile(member, io.BytesIO(image))
                add(archive, f"{i:03}.cls", str(i % 3).encode())
    else:
        cells = {"image": [{"bytes": image} for image in images], "label": [0, 1, 2] * 8}
        pq.write_table(
            pa.table(cells, TABLE),
            folder / "train.parquet",
            row_group_size=5,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
    return load(folder).fingerprint


def test_another_image_of_the_same_length_gives_another_fingerprint(kind, tmp_path):
    first = rewritten(tmp_path / "first", kind, "")
    assert rewritten(tmp_path / "same", kind, "") == first
    changes = ["different bytes", "another image"] + (["another time"] if kind == "tar" else [])
    for change in changes:
        assert rewritten(tmp_path / change, kind, change) != first, change


def test_a_shard_of_no_image_bytes_has_a_mark(tmp_path):
    write_groups(tmp_path, [[0], []])
    for file in tmp_path.iterdir():
        assert len(parquet_shards.scan(file, "image", "label").mark) == 32


def test_the_bytes_that_are_looked_at_lie_in_the_images(tmp_path):
    write_parquet_shards(tmp_path, [24], group=8)
    (file,) = tmp_path.iterdir()
    before = parquet_shards.scan(file, "image", "label").mark
    chunk = pq.read_metadata(file).row_group(1).column(0)
    content = bytearray(file.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    middle = start + chunk.total_compressed_size // 2
    content[middle : middle + 200] = b"\xff" * 200
    file.write_bytes(content)
    assert parquet_shards.scan(file, "image", "label").mark != before
