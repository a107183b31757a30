from pathlib import Path

import datasets
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from smallfry.data import faces, load_data
from smallfry.data.faces import read_faces, vary
from smallfry.data.sources import TEST, TRAIN, VALIDATION
from smallfry.errors import DataError, UsageError

SHARED = Path(__file__).parents[3] / "shared" / "data"
COUNTS = {TRAIN: 103_500, VALIDATION: 20_700, TEST: 41_400}


def write_photographs(folder: Path, people: int = 40, each: int = 10) -> None:
    """Soft noise on a level that tells the person, in a shuffled order."""
    generator = np.random.default_rng(0)
    who = generator.permutation(np.repeat(np.arange(people), each))
    noise = generator.integers(0, 40, (len(who), 16, 16))
    pixels = (noise.repeat(4, 1).repeat(4, 2) + 5 * who[:, None, None]).astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = {"image": [Image.fromarray(p) for p in pixels], "label": who}
    folder.mkdir(exist_ok=True)
    made = datasets.Dataset.from_dict(table, features=features)
    made.to_parquet(folder / "train-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder)
    return folder


def test_there_are_as_many_faces_as_in_the_paper_and_nobody_is_on_two_sides(photographs):
    splits = read_faces(photographs).splits
    assert {split: len(found.labels) for split, found in splits.items()} == COUNTS
    people = [set(found.labels.tolist()) for found in splits.values()]
    assert [len(some) for some in people] == [25, 5, 10]
    assert set.union(*people) == set(range(40))


def test_a_label_is_the_person_on_the_image(photographs):
    for split in read_faces(photographs).splits.values():
        for row in range(0, len(split.labels), 1777):
            level = split.read(row).mean() - 5 * split.labels[row]
            assert 10 < level < 30, row


def test_images_are_functions_of_the_seed_and_their_place_alone(photographs):
    one, same, stranger = (read_faces(photographs, seed=s).splits[TRAIN] for s in (0, 0, 1))
    rows = [5, 4000, 77]
    found = [one.read(row) for row in rows]
    assert all(
        np.array_equal(same.read(r), f) for r, f in zip(rows[::-1], found[::-1], strict=True)
    )
    assert one.fingerprint == same.fingerprint != stranger.fingerprint
    assert one.labels.tolist() != stranger.labels.tolist()


def test_variants_of_a_photograph_differ_and_have_levels_of_their_own(photographs):
    split = read_faces(photographs).splits[TRAIN]
    found = np.stack([split.read(row) for row in range(50)])
    assert (found.shape, found.dtype) == ((50, 1, 25, 25), np.uint8)
    assert len({image.tobytes() for image in found}) == 50
    assert found.std((1, 2, 3)).min() > 1


def test_a_crop_is_never_of_what_is_outside_the_photograph():
    white = Image.new("L", (72, 72), 255)  # turning fills what comes from outside with black
    for turn in np.linspace(-90, 90, 37):
        assert (vary(white, turn, 1.4) == 255).all()


def test_without_a_turn_the_centre_is_cropped_and_made_small():
    ramp = np.tile(np.arange(72, dtype=np.uint8), (72, 1))
    found = vary(Image.fromarray(ramp), 0.0, 1.6)[0]  # 40 pixels from 16 to 56, by 1.6
    assert np.abs(found - (16 + 1.6 * (np.arange(25) + 0.5) - 0.5)).max() <= 1
    turned = vary(Image.fromarray(ramp), 90.0, 1.6)[0]
    assert np.array_equal(turned, np.rot90(found))


def test_subsampling_does_not_alias():
    stripes = np.zeros((72, 72), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert vary(Image.fromarray(stripes), 0.0, 1.4).std() < 25  # every other pixel: 127


def test_load_data_takes_the_splits_as_they_are(photographs, monkeypatch):
    monkeypatch.setattr(faces, "VARIANTS", 2)
    data = load_data("faces", photographs, min_classes=1)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [500, 100, 200]
    assert (data.image_size, data.channels, len(data.classes)) == (25, 1, 40)
    assert data.origin == str(photographs)


def test_the_photographs_may_be_in_a_folder_of_their_name(tmp_path):
    write_photographs(tmp_path / "olivetti")
    assert read_faces(tmp_path).origin == str(tmp_path / "olivetti")


def test_other_photographs_are_refused(tmp_path):
    write_photographs(tmp_path, people=39)
    with pytest.raises(DataError, match=r"expected the Olivetti faces.*390 photographs of 39"):
        read_faces(tmp_path)


def test_scikit_learn_is_asked_where_no_folder_is_named(monkeypatch):
    levels = np.arange(400, dtype=np.float32) / 399
    fetched = sklearn.utils.Bunch(
        images=np.broadcast_to(levels[:, None, None], (400, 64, 64)), target=np.arange(400) // 10
    )
    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", lambda: fetched)
    source = read_faces()
    split = source.splits[TEST]
    assert source.origin == "scikit-learn"
    assert split.read(0)[0, 0, 0] == np.rint(255 * levels[split.labels[0] * 10])


def test_faces_that_can_not_be_fetched_say_what_to_do(monkeypatch):
    def fetch():
        raise OSError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", fetch)
    with pytest.raises(DataError, match=r"can't download.*go online.*--data\.root DIR"):
        load_data("faces", min_classes=1)


def test_faces_are_refused_where_classes_are_wanted():
    """And before anything is fetched."""
    with pytest.raises(UsageError, match=r"faces has no classes to distinguish.*min_classes=1"):
        load_data("faces")


@pytest.mark.skipif(not (SHARED / "olivetti").is_dir(), reason="no Olivetti faces beside us")
def test_the_real_photographs():
    splits = read_faces(SHARED).splits
    assert {split: len(found.labels) for split, found in splits.items()} == COUNTS
    some = np.stack([splits[TRAIN].read(row) for row in range(0, COUNTS[TRAIN], 500)])
    assert some.min() < 30
    assert some.max() > 215
    assert 120 < some.mean() < 150
