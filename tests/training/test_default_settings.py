"""Defaults of a new run by its images, its epochs and its model."""

from dataclasses import replace

import pytest
import timm
import torch
import yaml
from run_helpers import StopAt

from smallfry.errors import Stopped, UsageError
from smallfry.training.config import (
    AugmentConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.default_settings import (
    NORMED_RATE,
    SGD_RATE,
    describe_batch,
    describe_defaults,
    with_defaults,
    with_fitting_batch,
    with_fitting_crop,
    with_fitting_warmup,
    with_mixing,
    with_normed_rate,
    with_sgd_rate,
)
from smallfry.training.train import resume, train

MANY = 50_000


@pytest.mark.parametrize(
    ("given", "epochs", "chosen"),
    [
        (None, 1, 0.1),
        (None, 12, 1.2),
        (None, 50, 5.0),
        (None, 300, 5.0),
        (0.0, 12, 0.0),
        (5.0, 10, 5.0),
        (5.0, 9, 0.9),
        (30.0, 300, 30.0),
    ],
)
def test_the_warm_up_is_a_tenth_of_the_run_and_at_most_five_epochs(given, epochs, chosen):
    config = TrainConfig(epochs=epochs, schedule=ScheduleConfig(warmup_epochs=given))
    assert with_fitting_warmup(config).schedule.warmup_epochs == pytest.approx(chosen)


@pytest.mark.parametrize("name", ["sgd", "momentum", "sgdw", "csgdw", "sgdp", "nesterov"])
def test_sgd_has_a_default_rate_of_its_own(name):
    config = TrainConfig(optimizer=OptimizerConfig(name))
    assert with_sgd_rate(config).optimizer.lr == SGD_RATE
    given = TrainConfig(optimizer=OptimizerConfig(name, lr=0.3))
    assert with_sgd_rate(given) is given


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "sngd", "kfac", "adam_atan2", "rmsprop"])
def test_other_optimizers_keep_theirs(name):
    config = TrainConfig(optimizer=OptimizerConfig(name))
    assert with_sgd_rate(config) is config


@pytest.mark.parametrize(
    ("model", "optimizer", "rate"),
    [
        ("mobilenetv3_small_050", OptimizerConfig(), NORMED_RATE),
        ("mobilenetv3_small_050", OptimizerConfig("adam"), NORMED_RATE),
        ("mobilenetv3_small_050", OptimizerConfig(lr=0.3), 0.3),
        ("mobilenetv3_small_050", OptimizerConfig("lamb"), None),
        ("mobilenetv3_small_050", OptimizerConfig("kfac"), None),
        ("vitrm_micro_patch4_8", OptimizerConfig(), None),
        ("convnext_atto", OptimizerConfig(), None),
    ],
)
def test_adam_has_a_rate_of_its_own_on_models_with_batch_norms(model, optimizer, rate):
    config = TrainConfig(optimizer=optimizer)
    with torch.device("meta"):
        built = timm.create_model(model, num_classes=2)
    assert with_normed_rate(config, built).optimizer.lr == rate


@pytest.mark.parametrize(
    ("given", "epochs", "images", "batch"),
    [
        ({}, 50, 1_295, 64),  # the demo
        ({}, 10, 6_400, 64),
        ({}, 10, 6_399, 32),
        ({}, 10, 3_200, 32),
        ({}, 10, 3_199, 16),
        ({"accumulate": 20}, 1, 10, 32),
        ({"accumulate": 64}, 1, 10, 64),
        ({"batch_size": 64}, 1, 10, 64),
        ({"batch_size": 7}, 300, MANY, 7),
        ({"model": ModelConfig(start="runs/a")}, 1, 10, 64),
        ({"optimizer": OptimizerConfig("kfac")}, 1, 10, 64),
        ({"optimizer": OptimizerConfig("sgd")}, 1, 10, 16),
        ({"task": "multilabel"}, 1, 10, 16),
        ({"task": "puzzle"}, 1, 10, 64),
    ],
)
def test_short_runs_of_new_models_take_small_batches(given, epochs, images, batch):
    config = TrainConfig(epochs=epochs, **given)
    assert with_fitting_batch(config, images).batch_size == batch
    shared = with_fitting_batch(config, images, processes=2).batch_size
    assert shared == given.get("batch_size", 64)


def test_a_batch_that_is_not_chosen_yet_has_64_images():
    assert TrainConfig().images_per_step == 64
    assert TrainConfig(batch_size=8).images_per_step == 8
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        TrainConfig(batch_size=0)
    with pytest.raises(UsageError, match="accumulate can't exceed batch_size"):
        TrainConfig(accumulate=65)


def test_the_rate_for_batch_norms_is_recorded_and_earlier_runs_keep_theirs(variant):
    model = ModelConfig("resnet8_mlperf_tiny")
    data = replace(variant().data, image_size=32)
    config = variant(model=model, data=data, objective=ObjectiveConfig())
    with pytest.raises(Stopped):
        train(config, StopAt(2))
    file = config.run / "config.yaml"
    recorded = read_config(file)
    assert recorded.optimizer.lr == NORMED_RATE
    text = file.read_text()
    assert f"lr: {NORMED_RATE}" in text
    file.write_text(text.replace(f"lr: {NORMED_RATE}", "lr: null"))
    with pytest.raises(Stopped):
        resume(config.run, StopAt(3))
    assert read_config(file).optimizer.lr is None


def test_a_rate_chosen_after_a_stop_before_the_first_checkpoint_is_recorded(variant):
    model = ModelConfig("resnet8_mlperf_tiny")
    data = replace(variant().data, image_size=32)
    config = variant(model=model, data=data, objective=ObjectiveConfig())
    config.run.mkdir()
    file = config.run / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))  # of an earlier version, without a rate
    with pytest.raises(Stopped):
        resume(config.run, StopAt(2))
    assert read_config(file).optimizer.lr == NORMED_RATE


@pytest.mark.parametrize(
    ("epochs", "images", "size", "area", "padding"),
    [
        (50, MANY, 63, 0.0, None),
        (50, MANY, 64, 0.25, None),
        (12, 1_500, 32, 0.0, 0),
        (14, 1_500, 32, 0.0, None),
        (12, 1_500, 224, 0.0, 0),
    ],
)
def test_photographs_are_resized_small_images_padded_and_few_left_whole(
    epochs, images, size, area, padding
):
    chosen = with_fitting_crop(TrainConfig(epochs=epochs), images, size).augment
    assert (chosen.resized_crop, chosen.crop_padding) == (area, padding)


@pytest.mark.parametrize(
    ("given", "epochs", "images", "flip"),
    [
        ({}, 12, 1_666, False),
        ({}, 12, 1_667, None),
        ({"augment": AugmentConfig(flip=True)}, 12, 100, True),
        ({"augment": AugmentConfig(flips="alternating")}, 12, 100, None),
        ({"augment": AugmentConfig(crop_padding=4)}, 12, 100, False),
        ({"model": ModelConfig(start="runs/a")}, 12, 100, None),
        ({"task": "puzzle"}, 12, 100, None),
    ],
)
def test_few_images_are_not_mirrored(given, epochs, images, flip):
    config = TrainConfig(epochs=epochs, **given)
    assert with_fitting_crop(config, images, 32).augment.flip is flip


def test_given_crops_stay_and_trained_models_see_crops_of_few_images():
    padded = TrainConfig(augment=AugmentConfig(crop_padding=4), epochs=1)
    chosen = with_fitting_crop(padded, 100, 224).augment
    assert (chosen.resized_crop, chosen.crop_padding) == (0.0, 4)
    given = TrainConfig(augment=AugmentConfig(resized_crop=0.08, flip=True), epochs=1)
    assert with_fitting_crop(given, 100, 32) == given
    tuned = TrainConfig(model=ModelConfig(start="runs/a"), epochs=1)
    assert with_fitting_crop(tuned, 100, 64).augment.resized_crop == 0.25
    puzzle = with_fitting_crop(TrainConfig(task="puzzle"), MANY, 81).augment
    assert (puzzle.resized_crop, puzzle.crop_padding) == (0.0, None)


@pytest.mark.parametrize(
    ("epochs", "images", "task", "mixed"),
    [
        (50, 1_000, "classification", (0.2, 1.0)),
        (49, MANY, "classification", (0.0, 0.0)),
        (50, 999, "classification", (0.0, 0.0)),
        (50, MANY, "puzzle", (None, None)),
        (50, MANY, "multilabel", (None, None)),
    ],
)
def test_images_are_mixed_in_long_runs_of_classification(epochs, images, task, mixed):
    config = TrainConfig(epochs=epochs, task=task)
    chosen = with_mixing(config, images).augment
    assert (chosen.mixup, chosen.cutmix) == mixed
    given = replace(config, augment=AugmentConfig(mixup=0.4, cutmix=0.0))
    assert with_mixing(given, images) == given


def test_the_choice_is_described_in_one_line():
    given = TrainConfig(epochs=12)
    chosen = with_defaults(given, 1_350, 32)
    assert describe_defaults(given, chosen, 1_350) == (
        "12 epochs of 1,350 images: batches of 16, warm-up of 1.2 epochs, no Mixup, no CutMix, "
        "no random crops, no mirrored images"
    )
    long = with_defaults(TrainConfig(), MANY, 224)
    assert describe_defaults(TrainConfig(), long, MANY) == (
        "50 epochs of 50,000 images: warm-up of 5 epochs, Mixup 0.2, CutMix 1, "
        "crops of at least 25% of the area"
    )
    assert describe_defaults(chosen, with_defaults(chosen, 1_350, 32), 1_350) == ""
    assert with_defaults(chosen, 1_350, 32) == chosen


def test_a_run_begins_with_its_defaults(variant, capsys):
    train(variant(epochs=1, schedule=ScheduleConfig(), progress="plain"))
    assert "1 epoch of 200 images: warm-up of 0.1 epochs\n" in capsys.readouterr().out


def test_a_batch_of_more_than_all_images_is_described():
    config = TrainConfig(batch_size=1024)
    assert describe_batch(config, 1024) == describe_batch(TrainConfig(), 1) == ""
    assert describe_batch(config, 100) == "batches of all 100 images, as batch_size 1,024 is more"
