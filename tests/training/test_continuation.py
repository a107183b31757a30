"""Settings of a run that change between its last checkpoint and its continuation."""

import csv
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from run_helpers import StopAt, assert_same_run, metrics

from smallfry.errors import DataError, RunError, Stopped, UsageError
from smallfry.training import training_data
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.continuation import (
    changes_since,
    dotted,
    require_changeable,
    with_changes,
)
from smallfry.training.default_settings import SGD_RATE
from smallfry.training.train import resume, train


def edit(run, **settings):
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings))


def test_a_run_that_has_ended_is_lengthened(variant, tmp_path):
    run = tmp_path / "run"
    short = train(variant(run=run, epochs=2))
    before = metrics(run)
    longer = resume(run, changes={"epochs": 3})
    assert (short["measured"]["epochs"], longer["measured"]["epochs"]) == (2, 3)
    assert metrics(run)[:2] == before
    assert json.loads((run / "summary.json").read_text())["measured"]["epochs"] == 3
    assert resume(run) == json.loads((run / "summary.json").read_text())  # it has ended again


@pytest.mark.slow
def test_a_lengthened_run_that_is_stopped_goes_on_exactly(variant, tmp_path):
    for name in ("whole", "parted"):
        train(variant(run=tmp_path / name, epochs=2))
    resume(tmp_path / "whole", changes={"epochs": 4})
    with pytest.raises(Stopped):
        resume(tmp_path / "parted", StopAt(3), {"epochs": 4})
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")


def test_a_run_that_lost_patience_goes_on_with_more(variant, tmp_path):
    run = tmp_path / "run"
    frozen = {"optimizer": OptimizerConfig("sgd", lr=1e-12, weight_decay=0.0), "epochs": 4}
    ended = train(variant(run=run, patience=1, **frozen))
    assert ended["measured"]["epochs"] < 4
    assert resume(run, changes={"patience": 9})["measured"]["epochs"] == 4


@pytest.mark.parametrize("edited", [{"batch_size": 16}, {"seed": 5}])
def test_an_edit_that_would_repeat_images_is_refused(variant, tmp_path, edited):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(variant(run=run), StopAt(5))
    edit(run, **edited)
    name, value = next(iter(edited.items()))
    with pytest.raises(RunError, match=rf"has {name} {value}, and the run was trained with"):
        resume(run)


def test_the_best_epoch_is_chosen_by_the_score_of_now(variant, tmp_path):
    run = tmp_path / "run"
    train(variant(run=run, epochs=2))
    edit(run, select_by="loss")
    measured = resume(run, changes={"epochs": 6})["measured"]
    with (run / "metrics.csv").open() as stream:
        losses = [float(row["validation_loss"]) for row in csv.DictReader(stream)]
    assert measured["best_epoch"] == 3 + losses[2:].index(min(losses[2:]))
    kept, _, _ = load_checkpoint(run / "best")
    assert kept["training"]["scores"]["loss"] == pytest.approx(min(losses[2:]))


def test_other_edits_are_reported(variant, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(variant(run=run), StopAt(5))
    edit(run, progress="plain", schedule={"warmup_epochs": 0.5, "min_lr": 0.0})
    resume(run)
    assert "changed settings: schedule.warmup_epochs" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_resumes_and_has_its_position_checked(
    variant, tmp_path, whole
):
    with pytest.raises(Stopped):
        train(variant(run=tmp_path / "parted"), StopAt(8))
    last = tmp_path / "parted" / "last"
    _forget_settings(last)
    edit(tmp_path / "parted", batch_size=7)
    with pytest.raises(RunError, match="batch_size or data differ from the run's"):
        resume(tmp_path / "parted")
    edit(tmp_path / "parted", batch_size=variant().batch_size)
    resume(tmp_path / "parted")
    assert_same_run(whole, tmp_path / "parted")


def _forget_settings(folder):
    from smallfry.training.checkpoint import save_checkpoint

    manifest, weights, trainer = load_checkpoint(folder)
    del trainer["settings"]
    kept = {k: v for k, v in manifest.items() if k not in ("format", "smallfry", "files", "digest")}
    save_checkpoint(folder, kept, weights, trainer)


def test_a_run_goes_on_where_its_data_is_now(variant, tmp_path):
    folder, moved = tmp_path / "photos", tmp_path / "moved"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for number in range(8):
            level = 20 * number + 67 * (label == "b")
            Image.new("L", (8, 8), level).save(folder / label / f"{number}.png")
    data = DataConfig(str(folder), image_size=8, validation=0.25, test=0.25)
    train(variant(run=tmp_path / "whole", data=data))
    with pytest.raises(Stopped):
        train(variant(run=tmp_path / "parted", data=data), StopAt(2))
    folder.rename(moved)
    with pytest.raises(DataError, match=r"is missing; if it was moved: .*--data FOLDER"):
        resume(tmp_path / "parted")
    resume(tmp_path / "parted", changes={"data.name": str(moved)})
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
    assert read_config(tmp_path / "parted" / "config.yaml").data.name == str(moved)


def test_the_bit_depth_that_was_found_may_be_written_down():
    saved = dotted(TrainConfig().to_dict())
    (change,) = changes_since(saved, TrainConfig(DataConfig(bit_depth=12)))
    assert str(change) == "data.bit_depth null → 12"


def test_settings_are_saved_as_plain_data(variant, tmp_path):
    train(variant(run=tmp_path / "run", epochs=1))
    settings = torch.load(tmp_path / "run" / "last" / "trainer.pt", weights_only=True)["settings"]
    assert settings["optimizer.name"] == "adamw"
    assert json.loads(json.dumps(settings)) == settings


def test_only_what_decides_no_batch_can_be_changed():
    require_changeable(["epochs", "data.root", "workers"])
    for name in ("batch_size", "seed", "data.limit", "optimizer.lr", "nonsense"):
        with pytest.raises(UsageError, match=f"{name} can't change any more"):
            require_changeable([name])
    config = with_changes(TrainConfig(), {"epochs": 7, "data.name": "mnist"})
    assert config == TrainConfig(DataConfig("mnist"), epochs=7)
    rooted = TrainConfig(DataConfig("mnist", Path("here")))
    assert with_changes(rooted, {"data.name": "there"}).data == DataConfig("there")
    assert with_changes(rooted, {"data.root": Path("there")}).data.root == Path("there")
    saved = dotted(TrainConfig().to_dict())
    assert changes_since(saved, TrainConfig(workers=2, progress="quiet")) == [
        ("workers", None, 2),
    ]
    with pytest.raises(
        RunError, match=r"has data.limit 5, and .* with null so far: .* write null again"
    ):
        changes_since(saved, TrainConfig(DataConfig(limit=5)))


@pytest.mark.parametrize(("asked", "epochs", "kept"), [(5.0, 2, 0.2), (1.0, 2, 1.0), (2, 3, 0.3)])
def test_a_warm_up_of_most_of_the_run_is_shortened(
    variant, tmp_path, caplog, monkeypatch, asked, epochs, kept
):
    run = tmp_path / "run"
    monkeypatch.setattr(logging.getLogger("smallfry"), "propagate", True)
    caplog.set_level(logging.INFO, "smallfry")
    train(variant(run=run, epochs=epochs, schedule=ScheduleConfig(warmup_epochs=asked)))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["schedule"]["warmup_epochs"] == kept
    line = f"warm-up shortened from {asked:g} to {kept:g} epochs"
    assert (line in caplog.text) == (asked != kept)


def test_an_ended_run_goes_on_if_its_configuration_has_more_epochs(variant, tmp_path):
    run = tmp_path / "run"
    train(variant(run=run, epochs=1))
    edit(run, epochs=2)
    assert resume(run)["measured"]["epochs"] == 2
    with pytest.raises(UsageError, match="has done 2 epochs: expected as many at least, not 1"):
        resume(run, changes={"epochs": 1})
    assert read_config(run / "config.yaml").epochs == 2


def test_digits_stay_unmirrored_wherever_they_are_moved(variant, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(
            variant(run=run, augment=AugmentConfig(flips="alternating", mixup=0.0, cutmix=0.0)),
            StopAt(2),
        )
    recorded = read_config(run / "config.yaml")
    assert (recorded.data.name, recorded.augment.flip) == ("digits", None)
    load = training_data.load_config_data
    monkeypatch.setattr(training_data, "load_config_data", lambda wanted: load(recorded.data))
    (tmp_path / "elsewhere").mkdir()
    resume(run, changes={"data.name": str(tmp_path / "elsewhere")})
    assert read_config(run / "config.yaml").augment.flip is False


def test_no_link_in_a_run_folder_is_followed(variant, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(Stopped):
        train(variant(), StopAt(8))
    for name in ("best", "last", "pictures", "tensorboard"):
        run = shutil.copytree(variant().run, tmp_path / f"run with {name}")
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).symlink_to(foreign)
        with pytest.raises(RunError, match="a link, expected a folder of the run itself"):
            resume(run)
        assert (foreign / "thesis.txt").read_text() == "mine"


# The rate of SGD


def test_the_rate_of_sgd_is_recorded_so_that_earlier_runs_keep_theirs(variant):
    config = variant(optimizer=OptimizerConfig("sgd"))
    with pytest.raises(Stopped):
        train(config, StopAt(2))
    file = config.run / "config.yaml"
    recorded = read_config(file)
    assert recorded.optimizer.lr == SGD_RATE
    plain = replace(recorded, optimizer=OptimizerConfig("sgd"))  # as earlier versions recorded it
    file.write_text(yaml.safe_dump(plain.to_dict()))
    resume(config.run)
    assert read_config(file).optimizer.lr is None
    rates = [float(row["learning_rate"]) for row in metrics(config.run)]
    assert max(rates) < 0.192 / 16 < SGD_RATE
