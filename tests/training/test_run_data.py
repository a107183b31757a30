"""The data of a run: known by its content, wherever it is, and looked at before the training."""

import json
import os
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from run_helpers import StopAt, assert_same_run

from smallfry.deploy.pretrained import load_trained, save_pretrained
from smallfry.errors import DataError, RunError, SmallfryWarning, Stopped, UsageError
from smallfry.training.config import DataConfig, ObjectiveConfig, read_config
from smallfry.training.continuation import changes_since, dotted
from smallfry.training.evaluation import predict, score
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run, new_run_folder, require_classes
from smallfry.training.train import resume, train
from smallfry_runtime.files import DIGEST, with_digest

CAFE = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
LATIN_1 = os.fsdecode("thé".encode("latin-1"))


def write(folder: Path, names=("cat", "dog"), count=20, first=0) -> Path:
    """Classes that differ in brightness, of images that are all different."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            generator = np.random.default_rng([number, i])
            low = 180 * number // max(1, len(names) - 1)
            pixels = generator.integers(low, low + 70, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


@pytest.fixture
def on(config):
    """A run of a few steps on a folder."""

    def settings(folder: Path, **data):
        return replace(
            config,
            data=DataConfig(str(folder), **data),
            batch_size=8,
            objective=ObjectiveConfig(),
        )

    return settings


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos")


def evaluated(run: Path, name: str | None = None, split: str = "test"):
    """Where the split came from, how many images it has, and the accuracy on it."""
    trained = load_trained(str(run), "best")
    data, chosen, taken = load_like(trained, run, name, split=split)
    require_classes(trained, data.classes, data.origin)
    found = score(predict(trained.model, chosen, trained.normalize))
    return taken, len(chosen), found["accuracy"]


# Its own data


@pytest.mark.parametrize(
    "data",
    [
        {},
        pytest.param({"limit": 12}, marks=pytest.mark.slow),
        pytest.param({"test": 0.5, "split_seed": 3}, marks=pytest.mark.slow),
    ],
)
def test_the_data_of_the_training_is_known_however_it_is_named(
    on, photos, tmp_path, monkeypatch, data
):
    summary = train(on(photos, **data))
    run, count = tmp_path / "run", summary["data"]["test"]
    expected = ("test", count, summary["measured"]["test"]["accuracy"])
    (tmp_path / "link").symlink_to(photos)
    shutil.copytree(photos, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    for name in (None, "photos", "./photos/", "link", "copy", str(photos), "copy/../photos"):
        assert evaluated(run, name) == expected, name
    shutil.move("photos", "moved")
    assert evaluated(run, "moved") == expected


def test_a_shared_model_knows_its_data_under_any_name(on, photos, tmp_path):
    summary = train(on(photos))
    shared = save_pretrained(tmp_path / "run", tmp_path / "shared")
    photos.rename(tmp_path / "other name")
    taken, count, _ = evaluated(shared, str(tmp_path / "other name"))
    assert (taken, count) == ("test", summary["data"]["test"])


def test_a_model_shared_by_an_earlier_version_knows_its_data(on, photos, tmp_path):
    train(on(photos))
    shared = save_pretrained(tmp_path / "run", tmp_path / "shared")
    config = json.loads((shared / "config.json").read_text())
    del config["smallfry"]["data"]["splits"]["remove_duplicates"]
    (shared / "config.json").write_text(json.dumps(config))
    assert evaluated(shared, str(photos))[:2] == ("test", 8)


def test_data_that_has_changed_in_its_place_keeps_its_splits_with_a_warning(
    on, photos, tmp_path, monkeypatch
):
    train(on(photos))
    write(photos, count=5, first=100)
    monkeypatch.chdir(tmp_path)
    for name in (None, "photos"):
        with pytest.warns(SmallfryWarning, match="has changed since the training"):
            assert evaluated(tmp_path / "run", name)[:2] == ("test", 10)


def test_images_of_the_training_in_other_data_are_counted(on, photos, tmp_path):
    summary = train(on(photos))
    shutil.copytree(photos, tmp_path / "more")
    write(tmp_path / "more", count=5, first=100)
    trained_on = summary["data"]["train"]
    with pytest.warns(SmallfryWarning, match=f"{trained_on} of its 50 images are among those"):
        assert evaluated(tmp_path / "run", str(tmp_path / "more"))[:2] == ("all", 50)
    write(tmp_path / "new", first=100)
    assert evaluated(tmp_path / "run", str(tmp_path / "new"))[:2] == ("all", 40)


def test_data_that_is_gone_says_how_to_name_its_place(on, photos, tmp_path):
    train(on(photos))
    photos.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"is missing; if it was moved.*--data FOLDER"):
        evaluated(tmp_path / "run")
    with pytest.raises(UsageError, match="the location of its data is not recorded; give --data"):
        evaluated(tmp_path / "run" / "best")


# Classes


def test_classes_in_another_order_are_matched_by_their_names(on, tmp_path):
    from image_files import write_parquet

    train(on(write(tmp_path / "photos")))
    images = [Image.open(f).copy() for f in sorted((tmp_path / "photos").rglob("*.png"))]
    labels = [1] * 20 + [0] * 20
    (tmp_path / "table").mkdir()
    write_parquet(tmp_path / "table", "train", images, labels, names=["dog", "cat"])
    data, chosen, _ = load_like(
        load_run(tmp_path / "run"), tmp_path / "run", str(tmp_path / "table"), split="train"
    )
    assert data.classes == ("cat", "dog")
    bright = chosen.images.float().mean((1, 2, 3)) > 100
    assert chosen.labels.tolist() == bright.long().tolist()


def test_other_data_may_lack_a_class_and_have_one_more(on, photos, tmp_path, quiet_warnings):
    train(on(photos))
    run = tmp_path / "run"
    write(tmp_path / "one", names=("dog",), first=50)
    assert evaluated(run, str(tmp_path / "one"))[:2] == ("all", 20)
    write(tmp_path / "three", names=("cat", "dog", "yak"), first=50)
    trained = load_run(run)
    with pytest.warns(
        SmallfryWarning, match="skipped images of yak, which the model does not have"
    ):
        data, chosen, _ = load_like(trained, run, str(tmp_path / "three"))
    assert data.classes == trained.classes
    assert len(chosen) == 40
    for split in ("train", "test"):
        write(tmp_path / "parted" / split, names=("dog", "yak"), first=50)
    with pytest.warns(SmallfryWarning, match="skipped images of yak"):
        data, chosen, taken = load_like(trained, run, str(tmp_path / "parted"))
    assert (taken, chosen.labels.tolist()) == ("test", [1] * 20)


def test_data_of_none_of_the_models_classes_is_refused(on, photos, tmp_path):
    train(on(photos))
    write(tmp_path / "others", names=("emu", "yak"), first=50)
    with pytest.raises(DataError, match=r"the model has 2 classes \(cat, dog"):
        evaluated(tmp_path / "run", str(tmp_path / "others"))


def test_a_model_of_decomposed_names_knows_composed_ones(on, tmp_path):
    train(on(write(tmp_path / "photos", names=(CAFE[1], "tea"))))
    write(tmp_path / "others", names=(CAFE[0], "tea"), first=50)
    assert evaluated(tmp_path / "run", str(tmp_path / "others"))[:2] == ("all", 40)


# Before the training


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_broken_image_of_any_split_is_named_before_anything_is_written(on, tmp_path, split):
    for part in ("train", "val", "test"):
        write(tmp_path / "photos" / part, first=50 * len(part))
    (tmp_path / "photos" / split / "cat" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    with pytest.raises(DataError, match=r"bad\.png"):
        train(on(tmp_path / "photos"))
    assert not (tmp_path / "run").exists()


def test_a_test_image_that_broke_meanwhile_is_named_before_the_run_goes_on(on, tmp_path):
    for part in ("train", "test"):
        write(tmp_path / "photos" / part, first=50 * len(part))
    with pytest.raises(Stopped):
        train(on(tmp_path / "photos"), StopAt(2))
    (tmp_path / "photos" / "test" / "cat" / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.png"):
        resume(tmp_path / "run")


def test_a_missing_test_label_is_named_before_the_training(on, tmp_path):
    from image_files import grey, write_parquet

    write_parquet(tmp_path, "train", grey(40), [0, 1] * 20, names=["no", "yes"])
    write_parquet(tmp_path, "test", grey(4), [0, 1, None, 1], names=["no", "yes"])
    with pytest.raises(DataError, match="test row 2: label -1 is missing"):
        train(on(tmp_path))
    assert not (tmp_path / "run").exists()


def test_identical_images_in_two_splits_are_told_and_left_out_on_request(on, tmp_path):
    for part in ("train", "test"):
        write(tmp_path / "photos" / part, first=50 * len(part))
    file = tmp_path / "photos" / "train" / "cat" / "250.png"
    shutil.copy(file, tmp_path / "photos" / "test" / "cat" / "copy.png")
    with pytest.warns(SmallfryWarning, match="1 of 41 test images are in the train split too"):
        whole = train(replace(on(tmp_path / "photos", validation=0.0), select_on="test", epochs=1))
    without = train(
        replace(
            on(tmp_path / "photos", validation=0.0, remove_duplicates=True),
            select_on="test",
            epochs=1,
            run=tmp_path / "clean",
        )
    )
    assert (whole["data"]["train"], without["data"]["train"]) == (40, 39)
    assert whole["data"]["test"] == without["data"]["test"] == 41
    assert evaluated(tmp_path / "clean", str(tmp_path / "photos"))[:2] == ("test", 41)


# Resuming


@pytest.mark.parametrize("by_hand", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_goes_on_exactly_with_its_data_in_another_place_only(
    on, photos, tmp_path, monkeypatch, by_hand
):
    def resume_with(name: str) -> None:
        if not by_hand:
            resume(tmp_path / "run", changes={"data.name": name})
            return
        config = read_config(tmp_path / "run" / "config.yaml")
        config = replace(config, data=replace(config.data, name=str(tmp_path / name)))
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
        resume(tmp_path / "run")

    train(replace(on(photos), run=tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(on(photos), StopAt(3))
    photos.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"is missing; if it was moved: .*--resume .*--data FOLDER"):
        resume(tmp_path / "run")
    write(tmp_path / "others", first=50)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="was trained on other data"):
        resume_with("others")
    resume_with("moved")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    monkeypatch.chdir("/")
    assert read_config(tmp_path / "run" / "config.yaml").data.name == str(tmp_path / "moved")
    assert evaluated(tmp_path / "run")[:2] == ("test", 8)


def test_settings_that_came_after_a_checkpoint_had_their_defaults(config):
    saved = dotted(config.to_dict())
    del saved["data.remove_duplicates"]
    assert changes_since(saved, config) == []
    data = replace(config.data, remove_duplicates=True)
    with pytest.raises(RunError, match=r"data\.remove_duplicates True, and .* with False so far"):
        changes_since(saved, replace(config, data=data))


def test_the_place_of_the_data_is_not_written_down_before_it_is_found_to_be_right(
    on, photos, tmp_path
):
    with pytest.raises(Stopped):
        train(on(photos), StopAt(3))
    write(tmp_path / "others", first=50)
    with pytest.raises(DataError, match="was trained on other data"):
        resume(tmp_path / "run", changes={"data.name": str(tmp_path / "others")})
    assert read_config(tmp_path / "run" / "config.yaml").data.name == str(photos)


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_run_goes_on_exactly_under_a_cache_whose_pixels_were_changed(
    on, photos, tmp_path, monkeypatch, step
):
    train(replace(on(photos), run=tmp_path / "whole"))
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "kept"))
    with pytest.raises(Stopped):
        train(on(photos), StopAt(step))
    (file,) = (tmp_path / "kept").glob("*.npy")
    content = bytearray(file.read_bytes())
    for place in range(len(content) - 2000, len(content) - 64):
        content[place] ^= 255
    file.write_bytes(content)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    ended = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "run")]
    assert ended[0]["measured"]["test"] == ended[1]["measured"]["test"]


def test_a_run_of_an_earlier_version_goes_on_with_names_as_they_were_then(on, tmp_path):
    """Which took class names as they stood on the disk, into manifest and fingerprint."""
    from smallfry.data import load_data

    photos = write(tmp_path / "photos", names=(CAFE[1], "tea"))
    train(replace(on(photos), run=tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(on(photos), StopAt(3))
    file = tmp_path / "run" / "last" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest[DIGEST]
    manifest["classes"][0] = CAFE[1]
    earlier = load_data(str(photos))._fingerprint((CAFE[1], "tea"))
    assert earlier != manifest["data"]["fingerprint"]
    manifest["data"]["fingerprint"] = earlier
    file.write_text(json.dumps(with_digest(manifest)))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# Names that are not UTF-8


def test_data_whose_names_are_not_utf_8_is_trained_on_gone_on_with_and_evaluated(on, tmp_path):
    place = tmp_path / LATIN_1
    write(place, names=(LATIN_1, "tea"))
    settings = on(place)
    train(replace(settings, run=tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(settings, StopAt(3))
    assert read_config(tmp_path / "run" / "config.yaml").data.name == str(place)
    summary = resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert summary["data"]["name"] == "thé"
    assert load_run(tmp_path / "run").classes == ("tea", "thé")
    assert evaluated(tmp_path / "run", str(place))[:2] == ("test", 8)
    for file in tmp_path.glob("run/**/*.json"):
        file.read_text(encoding="utf-8").encode()
    shared = save_pretrained(tmp_path / "run", tmp_path / "shared")
    assert load_trained(str(shared), "best").classes == ("tea", "thé")


def test_a_run_folder_whose_name_is_not_utf_8_is_refused_before_anything_is_written(
    config, tmp_path
):
    with pytest.raises(RunError, match="the folder's name is not UTF-8"):
        train(replace(config, run=tmp_path / LATIN_1))
    assert list(tmp_path.iterdir()) == []
    assert new_run_folder(f"/photos/{LATIN_1}", "vit").name.startswith("thé-vit-")


def test_a_run_in_its_data_folder_makes_no_class(on, photos, tmp_path):
    run = photos / "runs" / "first"
    first = train(replace(on(photos), run=run))
    assert evaluated(run)[:2] == ("test", first["data"]["test"])
    assert evaluated(run, str(photos))[:2] == ("test", first["data"]["test"])
    second = train(replace(on(photos), run=photos / "cat" / "second"))
    assert second["data"] == first["data"]
    assert_same_run(run, photos / "cat" / "second")


def test_other_data_without_a_test_split_is_evaluated_on_its_validation_split(on, photos, tmp_path):
    train(on(photos))
    for split, first, count in (("train", 50, 10), ("val", 70, 7)):
        write(tmp_path / "other" / split, first=first, count=count)
    assert evaluated(tmp_path / "run", str(tmp_path / "other"))[:2] == ("validation", 14)


def test_another_test_split_is_told(on, tmp_path):
    for split, first in (("train", 0), ("test", 50)):
        write(tmp_path / "set" / split, first=first)
    summary = train(on(tmp_path / "set"))
    assert evaluated(tmp_path / "run")[:2] == ("test", 40)
    image = tmp_path / "set" / "test" / "cat" / "050.png"
    image.rename(tmp_path / "set" / "test" / "dog" / "000.png")
    for name in (None, str(tmp_path / "set")):
        with pytest.warns(SmallfryWarning, match="its test split has changed since the run was te"):
            assert evaluated(tmp_path / "run", name)[:2] == ("test", 40)
    assert evaluated(tmp_path / "run", split="train")[0] == "train"
    assert len(summary["data"]["test_fingerprint"]) == 16
