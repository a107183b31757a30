"""Runs whose training images stay in their shards."""

import json
import multiprocessing
from dataclasses import replace

import pytest
import yaml
from run_helpers import StopAt, assert_same_run, metrics
from shard_files import CLASSES, WRITERS

from smallfry.cli import main
from smallfry.data.stream import ShardPixels
from smallfry.errors import DataError, Stopped, TrainingError
from smallfry.training.config import DataConfig, EMAConfig, OptimizerConfig
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run
from smallfry.training.train import resume, train


@pytest.fixture
def streamed(variant, tmp_path):
    """A run of 2 epochs of 6 steps on shards, in windows of 40 images."""

    def build(kind="parquet", **changes):
        if not (tmp_path / "shards").exists():
            WRITERS[kind](tmp_path / "shards", [70, 90, 110])
        data = DataConfig(str(tmp_path / "shards"), stream=True, window=40)
        return variant(**{"data": data} | changes)

    return build


@pytest.mark.parametrize(
    ("kind", "step"), [("parquet", 4), pytest.param("tar", 9, marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_exactly_with_another_number_of_workers(
    streamed, tmp_path, kind, step
):
    train(streamed(kind, run=tmp_path / "whole", workers=0))
    with pytest.raises(Stopped, match=rf"after step {step} of 12"):
        train(streamed(run=tmp_path / "parted", workers=0), StopAt(step))
    file = tmp_path / "parted" / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"workers": 2}))
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")


@pytest.mark.slow
@pytest.mark.usefixtures("pictures_drawn")
def test_a_streamed_run_learns_and_is_used_like_any_other(streamed, tmp_path, capsys):
    run = tmp_path / "run"
    quiet = replace(streamed().augment, flip=False, mixup=0.0, cutmix=0.0)
    summary = train(
        streamed(
            run=run, ema=EMAConfig(0.9), augment=quiet, epochs=15, batch_size=16, references=True
        )
    )
    assert summary["measured"]["test"]["accuracy"] > 0.8
    assert summary["measured"]["references"]
    assert (run / "pictures" / "mistakes.png").is_file()
    trained = load_run(run)
    assert trained.classes == CLASSES
    _, split, taken = load_like(trained, run, split="train")
    assert isinstance(split.pixels, ShardPixels)
    assert (taken, len(split)) == ("train", summary["data"]["train"])
    for name in ("train", "test"):
        assert main(["evaluate", str(run), "--split", name, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["images"] == summary["data"][name]
        assert told["accuracy"] > 0.8


@pytest.mark.slow
def test_the_order_depends_on_the_window(streamed, tmp_path):
    first = streamed(run=tmp_path / "a", epochs=1)
    train(first)
    train(replace(first, run=tmp_path / "b", data=replace(first.data, window=1000)))
    assert metrics(tmp_path / "a") != metrics(tmp_path / "b")


def test_a_run_does_not_go_on_with_other_shards(streamed, tmp_path):
    with pytest.raises(Stopped):
        train(streamed(run=tmp_path / "run"), StopAt(3))
    shards = sorted((tmp_path / "shards").iterdir())
    shards[0].rename(shards[-1].with_name(f"z-{shards[0].name}"))
    with pytest.raises(DataError, match="was trained on other data"):
        resume(tmp_path / "run")


def test_a_damaged_image_ends_a_run_with_its_name_though_a_worker_found_it(variant, tmp_path):
    WRITERS["parquet"](tmp_path / "s", [130], spoilt=[77])
    for split in ("validation", "test"):
        WRITERS["parquet"](tmp_path / "s", [12], split=split, first=200)
    data = DataConfig(str(tmp_path / "s"), stream=True, image_size=8, mean=[0.5], std=[0.3])
    with pytest.raises(DataError, match=r"00001.parquet row 77: the image is damaged") as told:
        train(variant(data=data, workers=1))
    assert "Traceback" not in str(told.value)
    assert not multiprocessing.active_children()


def test_an_error_that_is_kept_leaves_no_workers_to_wait_for(variant):
    diverging = OptimizerConfig("sgd", lr=1e30, clip=None)
    with pytest.raises(TrainingError) as kept:
        train(variant(optimizer=diverging, workers=2))
    assert not multiprocessing.active_children(), kept
