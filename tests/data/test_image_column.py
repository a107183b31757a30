"""Parquet shards with names of columns of their own."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import write_images
from PIL import Image
from shard_files import CLASSES, numbers, picture, write_tar_shards

from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.training.config import DataConfig

TINY = "{embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}"


def mirrored(number):
    """A picture that is white where the other column's is dark."""
    pixels = 255 - np.asarray(Image.open(io.BytesIO(picture(number))))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(folder, count=24, first=0):
    """Write a table with two columns of bytes and two of classes."""
    folder.mkdir()
    taken = range(first, first + count)
    table = pa.table(
        {
            "raw": [mirrored(i) for i in taken],
            "scan": [picture(i) for i in taken],
            "kind": [CLASSES[i % 3] for i in taken],
            "site": ["a" if i % 2 else "b" for i in taken],
        }
    )
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tables") / "own"
    write(place)
    return place


@pytest.mark.parametrize("stream", [False, True])
def test_the_named_columns_are_read(folder, stream):
    given = {"label": "kind", "image_column": "scan", "stream": stream, "validation": 0.25}
    data = load_data(str(folder), **given)
    assert data.classes == tuple(sorted(CLASSES))
    found = [*numbers(data.validation.images), *numbers(data.test.images)]
    labels = [*data.validation.labels.tolist(), *data.test.labels.tolist()]
    assert [data.classes[label] for label in labels] == [CLASSES[i % 3] for i in found]
    assert len(data.train) + len(found) == 24
    other = load_data(str(folder), **{**given, "image_column": "raw"})
    pairs = zip(data.test.images, other.test.images, strict=True)
    assert all((255 - one == two).all() for one, two in pairs)
    assert data.fingerprint != other.fingerprint


def test_several_columns_of_bytes_need_a_choice(folder):
    with pytest.raises(DataError, match=r"bytes in raw, scan; select it: --data\.image_column"):
        load_data(str(folder), label="kind")
    with pytest.raises(UsageError, match="no column 'scam' for images; did you mean 'scan'"):
        load_data(str(folder), label="kind", image_column="scam")
    with pytest.raises(DataError, match="no column holds images"):
        load_data(str(folder), label="kind", image_column="site")


def test_it_is_of_tables_alone(tmp_path):
    for name in ("digits", "sudoku4"):
        with pytest.raises(
            UsageError, match=f"image_column is of a folder's tables, not of {name}"
        ):
            load_data(name, image_column="scan")
    write_images(tmp_path / "photos" / "cat", 3)
    write_images(tmp_path / "photos" / "dog", 3, seed=1)
    with pytest.raises(UsageError, match=r"image_column selects a column of a table, but .*photos"):
        load_data(str(tmp_path / "photos"), image_column="scan")
    with pytest.raises(UsageError, match="where images have several classes"):
        load_data(str(tmp_path / "photos"), image_column="scan", several_labels=True)
    write_tar_shards(tmp_path / "tars", [6])
    with pytest.raises(UsageError, match=r"image_column selects a column of a table; .*tar files"):
        load_data(str(tmp_path / "tars"), image_column="scan")


def test_a_run_keeps_its_column_and_evaluates_others_by_it(folder, tmp_path, capsys):
    assert DataConfig(str(folder), image_column="scan").image_column == "scan"
    model = ("--model.name=vitrm_micro_patch4_8", f"--model.options={TINY}")
    columns = ("--data.label=kind", "--data.image_column=scan")
    words = ["train", "--data", str(folder), *columns, *model, "--epochs=1", "--progress=quiet"]
    assert main([*words, "--references=false", "--run", str(tmp_path / "run")]) == 0
    write(tmp_path / "more", count=9, first=100)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "test"
    asked = ["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "more"), "--json"]
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9
