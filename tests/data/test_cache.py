"""Decoded images that are kept: their hash is checked whenever they are used again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import write_parquet_shards

from smallfry.data import cache, load_data
from smallfry.data.cache import BLOCK, HASH_LENGTH, content_hash


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        for i in range(8):
            file = tmp_path / "photos" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            generator = np.random.default_rng([*name.encode(), i])
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


def change(file, place):
    with open(file, "r+b") as stream:
        stream.seek(place, 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("place", [-1, -HASH_LENGTH, -HASH_LENGTH - 1, -HASH_LENGTH - 16 * 192])
def test_kept_images_that_were_changed_are_decoded_again(kept, photos, place, caplog):
    before = load_data(str(photos))
    images = before.train.images, before.test.images
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    change(file, place)
    after = load_data(str(photos))
    assert "damaged (its hash differs)" in caplog.text
    assert after.fingerprint == before.fingerprint
    assert torch.equal(after.train.images, images[0])
    assert torch.equal(after.test.images, images[1])
    assert file.read_bytes() == whole


def test_an_array_of_an_earlier_version_has_no_hash_and_is_made_again(kept, photos):
    load_data(str(photos))
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-HASH_LENGTH])
    load_data(str(photos))
    assert file.read_bytes() == whole


def test_a_whole_array_is_not_decoded_again(kept, photos, monkeypatch):
    load_data(str(photos))

    def decode(*_, **__):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "decode_with_peak", decode)
    assert len(load_data(str(photos)).train) == 10


@pytest.mark.parametrize("name", ["codes", "block_samples", "block_bytes", "samples"])
def test_an_index_that_was_changed_is_made_again(kept, tmp_path, name):
    write_parquet_shards(tmp_path / "s", [12, 12])
    before = load_data(str(tmp_path / "s"), stream=True).fingerprint
    (folder,) = (path for path in kept.iterdir() if path.is_dir())
    change(folder / f"{name}.npy", -1)
    assert load_data(str(tmp_path / "s"), stream=True).fingerprint == before
    told = json.loads((folder / "index.json").read_text())
    told["names"] = told["names"][::-1]
    (folder / "index.json").write_text(json.dumps(told))
    assert load_data(str(tmp_path / "s"), stream=True).fingerprint == before


def test_a_list_of_unreadable_images_that_was_changed_is_made_again(kept, tmp_path):
    write_parquet_shards(tmp_path / "s", [12, 12])
    options = {"stream": True, "skip_unreadable": True}
    before = load_data(str(tmp_path / "s"), **options).fingerprint
    (file,) = kept.glob("*.json")
    told = json.loads(file.read_text())
    for changed in ({**told, "faults": {"3": "broken"}}, {"3": "as earlier versions had it"}, []):
        file.write_text(json.dumps(changed))
        assert load_data(str(tmp_path / "s"), **options).fingerprint == before


def test_the_hash_is_of_type_shape_and_values():
    array = np.arange(24, dtype=np.uint8)
    others = [array.reshape(4, 6), array.astype(np.int8), array[::-1], array[:-1]]
    assert len({content_hash(each) for each in (array, *others)}) == 5
    assert content_hash(np.array(array)) == content_hash(array)
    content_hash(np.empty((0, 3), np.int64))


def test_every_block_of_a_large_array_is_hashed():
    array = np.zeros(BLOCK + 8, np.uint8)
    hashes = {content_hash(array)}
    for place in (0, BLOCK - 1, BLOCK, BLOCK + 7):
        array[place] = 1
        hashes.add(content_hash(array))
    assert len(hashes) == 5
