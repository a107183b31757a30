import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import grey, write_images, write_parquet
from PIL import Image

from smallfry.data import cache, load_data
from smallfry.data.splits import Split, hold_out
from smallfry.errors import DataError, SmallfryWarning, UsageError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number, name in enumerate(["cat", "dog", "owl"]):
        write_images(folder / name, 10, seed=number)
    return folder


# Digits


def test_digits_are_the_default_and_need_no_network():
    data = load_data()
    assert (data.image_size, data.channels, len(data.classes)) == (8, 1, 10)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797


def test_splits_are_disjoint_complete_and_stratified():
    data = load_data()
    rows = torch.cat([data.train.rows, data.validation.rows, data.test.rows])
    assert sorted(rows.tolist()) == list(range(1797))
    for split in (data.validation, data.test):
        counts = torch.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 3


def test_splits_depend_on_the_split_seed_alone():
    first, again, other = load_data(), load_data(), load_data(split_seed=1)
    assert torch.equal(first.test.rows, again.test.rows)
    assert not torch.equal(first.test.rows, other.test.rows)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_moments_are_those_of_the_training_pixels():
    data = load_data()
    values = data.train.images.double() / 255
    assert data.mean[0] == pytest.approx(values.mean().item())
    assert data.std[0] == pytest.approx(values.std(correction=0).item())


def test_digits_can_be_enlarged_and_coloured():
    data = load_data(image_size=12, channels=3)
    assert data.train.images.shape[1:] == (3, 12, 12)


@pytest.mark.parametrize("limit", [10, 100, 203])
def test_limit_takes_exactly_so_many_in_proportion(limit):
    data = load_data(limit=limit)
    assert len(data.train) == limit
    counts = torch.bincount(data.train.labels, minlength=10)
    assert counts.max() - counts.min() <= 2
    assert counts.min() >= 1
    assert len(data.test) == len(load_data().test)


def test_limit_keeps_a_class_of_one_image(photos, quiet_warnings):
    write_images(photos / "rare", 1)
    assert (load_data(str(photos), limit=8).train.labels == 3).sum() == 1


def test_limit_decodes_only_the_images_that_are_used(photos, monkeypatch):
    whole = load_data(str(photos))
    decoded = []
    decode = cache.decode_with_peak

    def watched(encoded, *rest):
        decoded.append(encoded)
        return decode(encoded, *rest)

    monkeypatch.setattr(cache, "decode_with_peak", watched)
    data = load_data(str(photos), limit=6, image_size=9)
    assert len(set(decoded)) == len(decoded) == 6 + len(data.validation)
    assert len(data.test) == len(whole.test) == 6
    assert len(decoded) == 6 + len(data.validation) + 6


@pytest.mark.parametrize("limit", [3, 6, 20, 1000])
def test_limit_takes_the_images_that_it_took_when_all_were_decoded(photos, limit):
    one = load_data(str(photos), limit=limit)
    other = load_data(str(photos), limit=limit, skip_unreadable=True)  # which decodes all
    assert one.fingerprint == other.fingerprint
    assert torch.equal(one.test.images, other.test.images)
    assert one.mean == other.mean


def test_a_broken_image_that_limit_leaves_out_does_no_harm(photos):
    used = load_data(str(photos), limit=3)
    names = {Path(used._locate["train"](i)) for i in range(3)}
    rest = [used._held_out.locate(i) for i in range(6)]
    rest += [used._locate["validation"](i) for i in range(len(used.validation))]
    spare = next(f for f in sorted(photos.rglob("*.png")) if f not in names and str(f) not in rest)
    spare.write_bytes(b"broken")
    assert load_data(str(photos), limit=3).fingerprint == used.fingerprint
    with pytest.raises(DataError, match=spare.name):
        load_data(str(photos))


# One folder per class


def test_a_folder_with_one_folder_per_class(photos):
    data = load_data(str(photos))
    assert data.classes == ("cat", "dog", "owl")
    assert (data.image_size, data.channels) == (8, 3)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [21, 3, 6]
    expected = np.asarray(Image.open(photos / "cat" / "000.png")).transpose(2, 0, 1)
    assert torch.equal(data.train.pixels[0], torch.from_numpy(expected.copy()))


def test_splits_that_a_folder_has_are_kept(tmp_path):
    for split, count in {"train": 6, "val": 2, "test": 4}.items():
        for name in ("a", "b"):
            write_images(tmp_path / split / name, count)
    data = load_data(str(tmp_path))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [12, 4, 8]


def test_large_images_come_at_32_pixels_or_at_the_size_asked_for(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 4, size=(100, 70))
    assert load_data(str(tmp_path)).image_size == 32
    assert load_data(str(tmp_path), image_size=48).train.images.shape[1:] == (3, 48, 48)


def test_grey_images_give_one_channel_and_mixed_ones_three(tmp_path):
    write_images(tmp_path / "a", 4, mode="L")
    write_images(tmp_path / "b", 4, mode="L")
    assert load_data(str(tmp_path)).channels == 1
    write_images(tmp_path / "b", 1, mode="RGBA")
    assert load_data(str(tmp_path)).channels == 3


def test_an_unreadable_image_is_named_or_left_out_on_request(photos):
    (photos / "dog" / "zz.png").write_bytes(b"not an image")
    (photos / "dog" / "zy.png").write_bytes(b"neither")
    with pytest.raises(DataError, match=r"zy\.png.*; fix or remove this and 1 more im.*skip_un"):
        load_data(str(photos))
    with pytest.warns(SmallfryWarning, match="2 unreadable images skipped"):
        data = load_data(str(photos), skip_unreadable=True)
    assert len(data.train) + len(data.validation) + len(data.test) == 30


def test_a_class_of_one_image_stays_in_training(photos):
    write_images(photos / "rare", 1)
    with pytest.warns(SmallfryWarning, match="rare: one image"):
        data = load_data(str(photos))
    assert (data.train.labels == 3).sum() == 1
    assert (data.test.labels == 3).sum() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: (root / "empty").mkdir(), "empty: empty class folder"),
        (lambda root: write_images(root, 1), r"000\.png: an image without a label"),
    ],
)
def test_folders_that_do_not_say_enough_are_refused(photos, make, message):
    make(photos)
    with pytest.raises(DataError, match=message):
        load_data(str(photos))


def test_hidden_files_and_folders_and_other_files_are_not_meant(photos):
    write_images(photos / ".ipynb_checkpoints", 2)
    write_images(photos / "cat" / ".thumbnails", 2)
    (photos / "cat" / "._0.png").write_bytes(b"a mac was here")
    (photos / "cat" / "notes.pdf").write_bytes(b"%PDF")
    (photos / "readme.pdf").write_bytes(b"%PDF")
    data = load_data(str(photos))
    assert data.classes == ("cat", "dog", "owl")
    assert len(data.train) + len(data.validation) + len(data.test) == 30


def test_a_broken_link_is_an_unreadable_image(photos):
    (photos / "cat" / "link.png").symlink_to(photos / "nowhere.png")
    with pytest.raises(DataError, match=r"link\.png: can't be read"):
        load_data(str(photos))


def test_folders_inside_a_class_belong_to_it(photos):
    write_images(photos / "cat" / "tabby", 4)
    assert (load_data(str(photos), test=0.0, validation=0.0).train.labels == 0).sum() == 14


def test_a_class_may_be_called_like_a_split(photos):
    write_images(photos / "train", 10)
    assert load_data(str(photos)).classes == ("cat", "dog", "owl", "train")


def test_splits_without_a_train_folder_are_refused(tmp_path):
    for split in ("val", "test"):
        for name in ("a", "b"):
            write_images(tmp_path / split / name, 2)
    with pytest.raises(DataError, match="no train folder"):
        load_data(str(tmp_path))


def test_an_empty_folder_and_a_single_class_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected one folder per class"):
        load_data(str(tmp_path))
    write_images(tmp_path / "only", 4)
    with pytest.raises(DataError, match="one class, 'only'; at least 2 are needed"):
        load_data(str(tmp_path))


def test_a_folder_around_the_right_one_names_that(photos):
    with pytest.raises(DataError, match=r"one class, 'photos'; .* did you mean .*/photos\?"):
        load_data(str(photos.parent))


def test_one_class_is_enough_where_labels_do_not_matter(tmp_path):
    write_images(tmp_path / "only", 10)
    data = load_data(str(tmp_path), min_classes=1)
    assert data.classes == ("only",)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [7, 1, 2]


def test_missing_classes_are_not_told_where_labels_do_not_matter(tmp_path):
    write_parquet(tmp_path, "train", grey(20), [0, 1] * 10, names=["no", "yes", "maybe"])
    assert len(load_data(str(tmp_path), min_classes=1).classes) == 3  # a warning is a failure here


def test_decoded_images_are_cached_and_follow_changes(photos, tmp_path, monkeypatch):
    cache = tmp_path / "kept"
    monkeypatch.setenv("SMALLFRY_CACHE", str(cache))
    before = load_data(str(photos))
    files = list(cache.iterdir())
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    load_data(str(photos))
    assert files[0].stat().st_mtime_ns == stamp
    write_images(photos / "cat", 10, seed=99)
    os.utime(photos / "cat" / "000.png", ns=(1, 1))
    assert load_data(str(photos)).fingerprint != before.fingerprint


def test_a_full_disk_under_the_cache_is_told(photos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"No space left.*SMALLFRY_CACHE"):
        load_data(str(photos))
    assert list((tmp_path / "kept").iterdir()) == []


def test_other_pixels_in_files_of_the_same_size_and_time_are_noticed(tmp_path):
    def make(place, value):
        for name in ("a", "b"):
            for i in range(3):
                file = place / "photos" / name / f"{i}.bmp"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), value).save(file)
                os.utime(file, ns=(0, 0))

    make(tmp_path / "here", 10)
    make(tmp_path / "there", 20)
    found = []
    for place in ("here", "there"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / place)
            found.append(load_data("photos").train.images.unique().tolist())
    assert found == [[10], [20]]
    make(tmp_path / "here", 30)
    assert load_data(str(tmp_path / "here" / "photos")).train.images.unique().tolist() == [30]


def test_the_cache_can_not_be_changed_through_the_images(photos):
    data = load_data(str(photos))
    before = data.train.images
    data.train.pixels.zero_()
    assert torch.equal(load_data(str(photos)).train.images, before)


def test_a_damaged_cache_file_is_made_again(photos, tmp_path, monkeypatch):
    cache = tmp_path / "kept"
    monkeypatch.setenv("SMALLFRY_CACHE", str(cache))
    before = load_data(str(photos)).fingerprint
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    assert load_data(str(photos)).fingerprint == before


# Named data sets


@pytest.mark.parametrize("inner", ["", "mnist"])
def test_a_named_data_set_is_read_from_the_folder_given(tmp_path, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    write_parquet(folder, "train", grey(20), [0, 1] * 10, names=["no", "yes"])
    assert load_data("mnist", tmp_path).origin == str(folder)


def test_without_a_folder_the_local_cache_comes_before_the_hub(monkeypatch):
    asked = []
    table = datasets.Dataset.from_dict(
        {"image": grey(20), "label": [0, 1] * 10},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])}
        ),
    )

    def load_dataset(repository):
        asked.append((repository, datasets.config.HF_HUB_OFFLINE))
        if datasets.config.HF_HUB_OFFLINE:
            raise ConnectionError("not in the cache")
        return datasets.DatasetDict({"train": table})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_data("mnist").classes == ("no", "yes")
    assert asked == [("ylecun/mnist", True), ("ylecun/mnist", False)]


def test_the_local_cache_of_datasets_is_read_without_a_network(tmp_path, monkeypatch):
    """As ``datasets`` leaves a hub data set in its cache, found with the hub out of reach."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path, "train", grey(20), [0, 1] * 10, names=["no", "yes"])
    shards = {"train": str(tmp_path / "train-00000-of-00001.parquet")}
    datasets.load_dataset("parquet", data_files=shards)
    built = next((tmp_path / "cache").glob("parquet/*/0.0.0/*/dataset_info.json")).parent
    kept = tmp_path / "cache" / "ylecun___mnist" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(built, kept)
    for file in kept.glob("parquet-*"):
        file.rename(kept / file.name.replace("parquet-", "mnist-"))
    data = load_data("mnist")
    assert (data.origin, data.classes) == ("hub: ylecun/mnist", ("no", "yes"))
    assert len(data.train) + len(data.validation) + len(data.test) == 20


def test_no_network_and_no_cache_say_what_to_do(monkeypatch):
    def load_dataset(repository):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"cifar10: not in the local cache.*--data.root DIR"):
        load_data("cifar10")


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_data("cifar10", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifra10"}, "did you mean 'cifar10'"),
        ({"name": "digits", "root": "."}, "digits comes with scikit-learn"),
        ({"channels": 2}, "data.channels must be 1"),
        ({"test": 1.5}, "data.test must be in"),
        ({"image_size": 0}, "data.image_size must be at least 1"),
        ({"image_size": 10**400}, "data.image_size must be at most 4096"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        load_data(**arguments)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="no CIFAR-10 beside the project")
def test_the_real_cifar10_from_parquet():
    data = load_data("cifar10", SHARED)
    assert (len(data.train), len(data.validation), data.image_size) == (45_000, 5_000, 32)
    assert data.classes[0] == "airplane"
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)


# Holding out


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 5),
)
def test_holding_out_parts_a_split_and_never_takes_a_class_whole(labels, share, seed):
    count = len(labels)
    split = Split(torch.zeros(count, 1, 1, 1), torch.arange(count), torch.tensor(labels))
    kept, held = hold_out(split, share, seed)
    assert sorted([*kept.rows.tolist(), *held.rows.tolist()]) == list(range(count))
    assert set(kept.labels.tolist()) == set(labels)
    assert torch.equal(kept.labels, split.labels[kept.rows])
    for label in set(labels):
        total, out = labels.count(label), int((held.labels == label).sum())
        assert out == (min(total - 1, max(1, round(share * total))) if share else 0)


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    """As of a variable of the shell that is not set."""
    monkeypatch.chdir(tmp_path)
    for label in ("cat", "dog"):
        write_images(tmp_path / label, 3)
    assert len(load_data(".").classes) == 2
    with pytest.raises(UsageError, match=r"data.name is empty: expected a data set or a folder"):
        load_data("")


def test_digits_are_read_from_their_table_once_and_changes_of_one_reading_stay_with_it(
    monkeypatch,
):
    first = load_data("digits")
    wanted = first.train.labels.clone(), first.train.images
    first.train.labels.zero_()
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: pytest.fail("read again"))
    again = load_data("digits")
    assert torch.equal(again.train.labels, wanted[0])
    assert torch.equal(again.train.images, wanted[1])
