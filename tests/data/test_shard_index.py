"""Shards of strangers: labels in all forms, damage, and archives that mean no good."""

import gzip
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shard_files import CLASSES, WRITERS, add, numbers, picture, write_parquet_shards
from shard_files import write_tar_shards as write_tars

from smallfry.data import load_data, parquet_shards, shard_index, tar_shards
from smallfry.data.stream import ShardPixels
from smallfry.errors import DataError, SmallfryWarning


def load(folder, **options):
    return load_data(str(folder), stream=True, **{"test": 0.0, "validation": 0.0} | options)


def write_members(folder, *members, name="train-000000.tar"):
    """A tar file with twelve good samples, and then other members."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as archive:
        for i in range(12):
            add(archive, f"{i:06}.png", picture(i))
            add(archive, f"{i:06}.cls", str(i % 3).encode())
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                add(archive, *member)
    return folder


# Labels


def test_numbers_are_class_names_where_nobody_says_more(tmp_path):
    write_tars(tmp_path / "tar", [12])
    write_parquet_shards(tmp_path / "parquet", [12], names=None)
    for name in ("tar", "parquet"):
        data = load(tmp_path / name)
        assert data.classes == ("0", "1", "2")
        assert data.train.labels.tolist() == [0, 1, 2] * 4


def test_names_are_taken_from_the_table_the_json_or_a_list_beside_the_shards(tmp_path):
    write_parquet_shards(tmp_path / "declared", [12])
    write_tars(tmp_path / "json", [12], label="json")
    write_tars(tmp_path / "list", [12])
    write_parquet_shards(tmp_path / "bare", [12], names=None)
    for name in ("list", "bare"):
        (tmp_path / name / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for name in ("declared", "json", "list", "bare"):
        data = load(tmp_path / name)
        assert data.classes == CLASSES
        assert data.train.labels.tolist() == [0, 1, 2] * 4


def test_the_number_of_a_label_is_its_line_in_the_list_whichever_occur(tmp_path):
    write_tars(tmp_path / "s", [12])
    (tmp_path / "s" / "classes.txt").write_text("ape\ncat\ndog\nowl")
    with pytest.warns(SmallfryWarning, match="owl: no training image"):
        assert load(tmp_path / "s").train.labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("cat\ndog\n", r"sample 2 \('000002.png'\): label 2 is not among the 2 classes"),
        ("cat\ncat\nowl\n", "'cat' stands there twice"),
        ("cat\n\nowl\n", "a line is empty"),
        (b"\xff\xfe\x00", "can't be read as text"),
    ],
)
def test_a_wrong_list_of_classes_is_refused(lines, message, tmp_path):
    write_tars(tmp_path / "s", [12])
    content = lines if isinstance(lines, bytes) else lines.encode()
    (tmp_path / "s" / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "s")


def test_a_class_that_only_the_test_split_has_is_refused(tmp_path):
    write_tars(tmp_path / "s", [12])
    with tarfile.open(tmp_path / "s" / "test-000000.tar", "w") as archive:
        add(archive, "a.png", picture(1))
        add(archive, "a.cls", b"7")
    with pytest.raises(DataError, match=r"test-000000.tar sample 0 .*class '7' is not among the"):
        load(tmp_path / "s")


def test_the_key_of_the_json_that_is_the_label_can_be_named(tmp_path, quiet_warnings):
    told = {"id": 5, "label": "x", "kind": "cat"}
    members = [("x.png", picture(1)), ("x.json", json.dumps(told).encode())]
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for member in members:
            add(archive, *member)
        add(archive, "y.jpg", picture(2))
        add(archive, "y.json", json.dumps(told | {"kind": "dog"}).encode())
    assert load(tmp_path, label="kind").classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"'x', its .json: expected one of the keys name, found 0"):
        load(tmp_path, label="name")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.png", picture(1))], r"'x' is an image without a label; expected a .cls or .json"),
        ([("x.cls", b"1"), ("y.png", picture(1)), ("x.png", picture(1))], "'y' is an image with"),
        (
            [("x.png", picture(1)), ("x.a.jpg", picture(1)), ("x.cls", b"1")],
            "two images have the key",
        ),
        ([("x.png", picture(1)), ("x.cls", b" \n")], "'x', its .cls: expected a number or a name"),
        ([("x.png", picture(1)), ("x.cls", b"\xff\xfe")], "expected a number or a name"),
        ([("x.png", picture(1)), ("x.json", b"{")], "'x', its .json: not JSON"),
        ([("x.png", picture(1)), ("x.json", b"[" * 100_000)], "its .json: not JSON"),
        ([("x.png", picture(1)), ("x.json", b'{"a": 1}')], "one of the keys label, cls, class"),
        ([("x.png", picture(1)), ("x.json", b'{"label": 1.5}')], "neither an integer nor text"),
        ([("x.png", picture(1)), ("x.json", b'{"label": true}')], "neither an integer nor text"),
        ([("x.png", picture(1)), ("x.cls", b"cat")], "some labels are numbers and some are text"),
        ([("x.png", picture(1)), ("x.cls", b"1" * 2_000_000)], "'x.cls' is too large for a label"),
    ],
)
def test_a_sample_whose_label_is_not_clear_is_refused(members, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(write_members(tmp_path / "s", *members))


def test_folders_in_the_archive_are_part_of_the_key_and_hidden_files_are_not_meant(tmp_path):
    there = tarfile.TarInfo("a")
    there.type = tarfile.DIRTYPE
    more = [("a/000000.png", picture(12)), ("a/000000.cls", b"0"), ("a/._000000.png", b"junk")]
    data = load(write_members(tmp_path / "s", there, *more))
    assert numbers(data.train.images) == list(range(13))


@pytest.mark.parametrize("value", [None, 7])
def test_a_row_without_a_known_label_is_named(value, tmp_path):
    write_parquet_shards(tmp_path / "s", [12])
    file = next((tmp_path / "s").iterdir())
    table = pq.read_table(file)
    labels = table["label"].to_pylist()
    labels[5] = value
    changed = table.set_column(1, table.schema.field("label"), [labels])
    pq.write_table(changed, file)
    with pytest.raises(DataError, match=rf"parquet row 5: its label, {value}, is missing or not a"):
        load(tmp_path / "s")


# Archives that mean no good


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        ("../escape.png", picture(99)),
        ("/absolute.png", picture(99)),
        ("a/../../escape.png", picture(99)),
        special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.png", tarfile.LNKTYPE, "000000.png"),
        special("device.png", tarfile.CHRTYPE),
        special("pipe.png", tarfile.FIFOTYPE),
    ],
)
def test_links_devices_and_names_that_lead_out_are_left_out_and_told(member, tmp_path):
    folder = write_members(tmp_path / "s", member)
    before = set(tmp_path.rglob("*"))
    with pytest.warns(SmallfryWarning, match="1 members of tar files that are no samples left out"):
        data = load(folder)
    assert numbers(data.train.images) == list(range(12))
    assert set(tmp_path.rglob("*")) == before


def test_a_label_without_an_image_is_left_out_and_told(tmp_path):
    folder = write_members(tmp_path / "s", ("x.cls", b"1"), ("y.txt", b"no label"))
    with pytest.warns(SmallfryWarning, match="'x' has a label and no image"):
        assert len(load(folder).train) == 12


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path):
    folder = write_members(tmp_path / "s", special("x" * 200, tarfile.REGTYPE))
    file = folder / "train-000000.tar"
    content = bytearray(file.read_bytes())
    at = content.index(b"././@LongLink") if b"././@LongLink" in content else content.index(b"@PaxH")
    at -= at % 512
    header = tarfile.TarInfo.frombuf(bytes(content[at : at + 512]), "utf-8", "surrogateescape")
    header.size = 2**33 - 1
    content[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)[:512]
    file.write_bytes(content)
    with open(file, "r+b") as stream:
        os.truncate(stream.fileno(), 2**33)  # the file is as long as it claims, and all holes
    with pytest.raises(DataError, match=r"damaged after its sample 1[01] .*more than a megabyte"):
        load(folder)


def test_a_length_below_zero_does_not_send_the_scan_in_circles(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    with tarfile.open(folder / "train.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(3):
            add(archive, f"{i}.png", picture(i))
            add(archive, f"{i}.cls", str(i).encode())
        member = tarfile.TarInfo("x.png")
        member.pax_headers = {"size": "-1536"}
        archive.addfile(member)
    with pytest.raises(DataError, match=r"train\.tar: damaged after its sample"):
        load(folder)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_image_of_very_many_bytes_is_not_read(kind, tmp_path, monkeypatch):
    for module in ("smallfry.data.shards", "smallfry.data.tar_shards"):
        monkeypatch.setattr(f"{module}.MOST_BYTES", 50)
    WRITERS[kind](tmp_path / "s", [12])
    with pytest.raises(DataError, match=r"(row 0|sample 0 .*): an image of 0 MB; at most 0 are"):
        _ = load(tmp_path / "s", image_size=8, channels=1).train.images


def test_a_row_group_that_does_not_fit_in_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_shards, "MOST_BLOCK", 1000)
    write_parquet_shards(tmp_path / "s", [12], group=12)
    with pytest.raises(DataError, match=r"00001\.parquet: its row group 0 holds .* about 1,000"):
        load(tmp_path / "s")


# Damage


@pytest.mark.parametrize("kind", WRITERS)
def test_an_unreadable_image_is_named_or_left_out(kind, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    WRITERS[kind](folder, [12, 12], spoilt=[5, 17])
    with pytest.raises(DataError, match=r"train-0.*(row 5|sample 5 .*): the image is damaged"):
        _ = load(folder).train.images
    for again in range(2):
        with pytest.warns(SmallfryWarning, match="2 unreadable images skipped, the first: .* 5"):
            data = load(folder, skip_unreadable=True, validation=0.2, test=0.2)
        left = [i for s in (data.train, data.validation, data.test) for i in numbers(s.images)]
        assert sorted(left) == sorted(set(range(24)) - {5, 17}), again
        monkeypatch.setattr(ShardPixels, "_fault", None)  # the second time, nothing is looked at


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("left", [0, 100, 1200, 3000])
def test_a_truncated_shard_is_refused_or_its_rest_left_out(kind, left, tmp_path):
    folder = tmp_path / "s"
    WRITERS[kind](folder, [12, 12, 12])
    file = sorted(folder.iterdir())[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    with pytest.raises(DataError, match=rf"{file.name}: (not a|damaged after its sample).*copy"):
        load(folder)
    with pytest.warns(SmallfryWarning, match="1 damaged shards"):
        data = load(folder, skip_unreadable=True)
    seen = numbers(data.train.images)
    assert {*range(12), *range(24, 36)} <= set(seen) < set(range(36))
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("cut", [1024 * 20, 1024 * 20 + 512, 1024 * 20 + 700])
def test_a_tar_file_that_ends_at_a_header_is_no_whole_one(cut, tmp_path):
    folder = tmp_path / "s"
    write_tars(folder, [12])
    file = folder / "train-000000.tar"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"damaged after its sample [89]"):
        load(folder)


def test_a_header_in_the_middle_that_is_no_header_is_not_taken_for_the_end(tmp_path):
    folder = tmp_path / "s"
    write_tars(folder, [12])
    file = folder / "train-000000.tar"
    content = bytearray(file.read_bytes())
    content[1024 * 10 : 1024 * 10 + 100] = b"#" * 100
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"after its sample 3 .*mark that ends a tar file"):
        load(folder)


def test_a_damaged_row_group_is_named_or_its_samples_left_out(tmp_path):
    folder = tmp_path / "s"
    write_parquet_shards(folder, [24], group=8)
    file = next(folder.iterdir())
    place = pq.read_metadata(file).row_group(1).column(0)
    content = bytearray(file.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    content[start : start + 30] = b"\xff" * 30
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"parquet: row group 1 is damaged"):
        _ = load(folder, channels=1, image_size=8).train.images
    with pytest.warns(SmallfryWarning, match="8 unreadable images skipped"):
        data = load(folder, skip_unreadable=True)
    assert numbers(data.train.images) == [*range(8), *range(16, 24)]


def test_a_shard_that_changes_while_it_is_read_is_noticed(tmp_path):
    write_parquet_shards(tmp_path / "s", [24], group=8)
    data = load(tmp_path / "s")
    data.train.pixels.reader._held.clear()
    write_parquet_shards(tmp_path / "s", [24], group=6)
    with pytest.raises(DataError, match="8 when indexed; the file may have changed since"):
        _ = data.train.images


def test_a_shard_that_goes_away_is_named(tmp_path):
    write_tars(tmp_path / "s", [12])
    data = load(tmp_path / "s")
    (tmp_path / "s" / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: can't be read"):
        _ = data.train.images


def test_images_in_files_beside_the_table_are_not_streamed(tmp_path):
    write_parquet_shards(tmp_path / "s", [12])
    file = next((tmp_path / "s").iterdir())
    table = pq.read_table(file)
    cells = [{"bytes": None, "path": "/etc/passwd"}] * 12
    cells = pa.array(cells, table.schema.field("image").type)
    pq.write_table(table.set_column(0, table.schema.field("image"), cells), file)
    with pytest.raises(DataError, match=r"row 0: a label without an image .*stream false"):
        _ = load(tmp_path / "s", channels=1, image_size=8).train.images


# Which files are shards


def test_a_compressed_tar_file_is_refused_with_a_way_out(tmp_path):
    write_tars(tmp_path / "s", [12])
    (file,) = (tmp_path / "s").iterdir()
    file.with_suffix(".tar.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    with pytest.raises(DataError, match=r"compressed tar file .*gunzip"):
        load(tmp_path / "s")


def test_an_archive_beside_class_folders_is_not_meant(tmp_path):
    write_tars(tmp_path, [12], split="photos")
    for number, name in enumerate(CLASSES):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(picture(3 * i + number))
    assert load_data(str(tmp_path)).classes == CLASSES


def test_shards_without_a_split_in_their_names_are_to_train_on(tmp_path):
    write_tars(tmp_path, [12, 12], split="photos")
    assert len(load(tmp_path).train) == 24


def test_shards_without_any_to_train_on_are_refused(tmp_path):
    write_tars(tmp_path, [12], split="test")
    with pytest.raises(DataError, match="no train split, only test"):
        load(tmp_path)


def test_a_shard_with_other_columns_is_refused(tmp_path):
    write_parquet_shards(tmp_path, [12, 12])
    file = sorted(tmp_path.iterdir())[1]
    table = pq.read_table(file)
    pq.write_table(table.rename_columns(["image", "kind"]), file)
    with pytest.raises(DataError, match="has no column 'label', unlike the first shard"):
        load(tmp_path)


def test_shards_are_indexed_once_until_one_changes(tmp_path, monkeypatch):
    write_tars(tmp_path / "s", [12, 12])
    scanned = []
    scan = tar_shards.scan
    monkeypatch.setattr(tar_shards, "scan", lambda f, k: (scanned.append(f.name), scan(f, k))[1])
    first = load(tmp_path / "s")
    assert scanned == ["train-000000.tar", "train-000001.tar"]
    again = load(tmp_path / "s")
    assert len(scanned) == 2
    assert torch.equal(first.train.images, again.train.images)
    write_tars(tmp_path / "s", [12, 15])
    assert len(load(tmp_path / "s").train) == 27
    assert len(scanned) == 4


def test_a_damaged_index_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))
    write_tars(tmp_path / "s", [12])
    load(tmp_path / "s")
    (kept,) = (tmp_path / "cache").glob("index-*/codes.npy")
    kept.write_bytes(b"")
    assert load(tmp_path / "s").train.labels.tolist() == [0, 1, 2] * 4


def test_a_cache_that_can_not_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "file"))
    write_tars(tmp_path / "s", [12])
    with pytest.raises(DataError, match="the index of the shards can't be kept there"):
        load(tmp_path / "s")


def test_tar_files_can_be_decoded_at_once_too(tmp_path):
    write_tars(tmp_path / "s", [12, 12])
    data = load_data(str(tmp_path / "s"), test=0.0, validation=0.0)
    assert isinstance(data.train.pixels, torch.Tensor)
    assert numbers(data.train.images) == list(range(24))
    assert shard_index.find_shards(tmp_path / "s").kind == "tar"
