"""Images of 10, 12 or 14 bits in files of 16: one scale for a data set, given or found."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shard_files import add

from smallfry.data import load_data
from smallfry.errors import DataError, SmallfryWarning, UsageError

TOP = {"dark": 900, "light": 4000}  # of 4095


def picture(top: int, number: int) -> bytes:
    values = np.linspace(0, top - number, 64).reshape(8, 8).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def write_folders(folder: Path, count: int = 10, tops=TOP) -> None:
    for name, top in tops.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / name / f"{i:03}.png").write_bytes(picture(top, i))


def write_parquet(folder: Path) -> None:
    folder.mkdir(parents=True)
    kind = pa.schema([("image", pa.struct([("bytes", pa.binary())])), ("label", pa.string())])
    names = [name for name in TOP for _ in range(10)]
    cells = [{"bytes": picture(TOP[name], i % 10)} for i, name in enumerate(names)]
    pq.write_table(pa.table({"image": cells, "label": names}, kind), folder / "train-0.parquet")


def write_tar(folder: Path) -> None:
    import tarfile

    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-0.tar", "w") as archive:
        for number, name in enumerate(name for name in TOP for _ in range(10)):
            add(archive, f"{number:03}.png", picture(TOP[name], number % 10))
            add(archive, f"{number:03}.cls", name.encode())


WRITERS = {"folders": write_folders, "parquet": write_parquet, "tar": write_tar}


def expected(bits: int, name: str = "light", number: int = 0) -> np.ndarray:
    values = np.asarray(Image.open(io.BytesIO(picture(TOP[name], number)))).astype(int)
    return values * 255 // (2**bits - 1)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("stream", [False, True])
def test_the_bit_depth_is_found_over_all_images_and_told(kind, stream, tmp_path):
    if kind == "folders" and stream:
        pytest.skip("folders are not streamed")
    WRITERS[kind](tmp_path / "x")
    what = "values of 20 images" if stream else "all values"
    with pytest.warns(SmallfryWarning, match=rf"{what} .*12 bits are assumed, with white at 4,095"):
        data = load_data(str(tmp_path / "x"), stream=stream, validation=0.0, test=0.0)
    assert data.bit_depth == 12
    for label, name in enumerate(data.classes):
        first = data.train.images[data.train.labels == label][0, 0]
        assert np.array_equal(first.numpy(), expected(12, name))
    given = load_data(str(tmp_path / "x"), stream=stream, validation=0.0, test=0.0, bit_depth=12)
    assert torch.equal(given.train.images, data.train.images)  # and no warning


@pytest.mark.parametrize("kind", WRITERS)
def test_a_given_bit_depth_is_the_scale(kind, tmp_path):
    WRITERS[kind](tmp_path / "x")
    data = load_data(str(tmp_path / "x"), validation=0.0, test=0.0, bit_depth=16)
    light = data.train.images[data.train.labels == 1][0, 0]
    assert data.bit_depth == 16
    assert np.array_equal(light.numpy(), expected(16))
    for depth in (0, 17, -1):
        with pytest.raises(UsageError, match=r"data.bit_depth must be 1 to 16"):
            load_data(str(tmp_path / "x"), bit_depth=depth)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_image_beyond_the_given_depth_is_named(kind, tmp_path):
    WRITERS[kind](tmp_path / "x")
    with pytest.raises(DataError, match=r"(png|row 10|sample 10).*holds the value 4,000.* 10 bits"):
        _ = load_data(str(tmp_path / "x"), bit_depth=10, validation=0.0, test=0.0).train.images
    wanted = {"skip_unreadable": True, "validation": 0.0, "test": 0.0, "min_classes": 1}
    with pytest.warns(SmallfryWarning, match="10 unreadable images skipped"):
        data = load_data(str(tmp_path / "x"), bit_depth=10, **wanted)
    assert len(data.train) == 10


def test_all_splits_have_one_scale(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))
    write_folders(tmp_path / "x" / "train", tops={"dark": 100, "light": 900})  # 10 bits of its own
    write_folders(tmp_path / "x" / "validation", 2)
    write_folders(tmp_path / "x" / "test", 2, tops={"dark": 100, "light": 16_000})
    for _ in range(2):  # the second time from the cache
        with pytest.warns(SmallfryWarning, match="14 bits are assumed"):
            data = load_data(str(tmp_path / "x"))
        assert data.bit_depth == 14
        assert data.train.images.max() == 900 * 255 // 16_383
        assert data.validation.images.max() == 4000 * 255 // 16_383
        assert data.test.images.max() == 16_000 * 255 // 16_383


def test_full_16_bits_are_no_guess_and_as_they_always_were(tmp_path):
    write_folders(tmp_path / "x", tops={"dark": 20_000, "light": 65_535})
    data = load_data(str(tmp_path / "x"), validation=0.0, test=0.0)  # a warning is a failure
    assert data.bit_depth == 16
    assert data.train.images.max() == 255


def test_images_of_8_bits_have_no_bit_depth_and_keep_their_values(tmp_path):
    write_folders(tmp_path / "x")
    for i, file in enumerate(sorted((tmp_path / "x").glob("*/*.png"))):
        Image.new("L", (8, 8), 10 * i).save(file)
    data = load_data(str(tmp_path / "x"), validation=0.0, test=0.0)
    assert data.bit_depth is None
    assert data.train.images[:, 0, 0, 0].tolist() == [10 * i for i in range(20)]


def test_wide_images_in_the_test_split_alone_are_told(tmp_path):
    for name in TOP:
        (tmp_path / "x" / "train" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 9).save(tmp_path / "x" / "train" / name / f"{i}.png")
    write_folders(tmp_path / "x" / "test", 2)
    data = load_data(str(tmp_path / "x"))
    with pytest.warns(SmallfryWarning, match="unlike the training images: .* 0 to 65,535"):
        assert data.test.images.max() == 4000 // 257
    given = load_data(str(tmp_path / "x"), bit_depth=12)
    assert given.bit_depth == 12
    assert given.test.images.max() == expected(12).max()


def test_kept_pixels_of_one_depth_are_not_taken_for_those_of_another(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))
    write_folders(tmp_path / "x")
    tops = []
    for depth in (12, 16, 14, 12, 16):
        data = load_data(str(tmp_path / "x"), bit_depth=depth, validation=0.0, test=0.0)
        tops.append(int(data.train.images.max()))
    assert tops == [4000 * 255 // most for most in (4095, 65_535, 16_383, 4095, 65_535)]
    with pytest.warns(SmallfryWarning, match="12 bits"):
        load_data(str(tmp_path / "x"))
    before = sorted(os.listdir(tmp_path / "cache"))
    load_data(str(tmp_path / "x"), bit_depth=12)
    assert sorted(os.listdir(tmp_path / "cache")) == before  # nothing is decoded twice
