"""The pieces of the fast recipe, each against its definition; and a run with all of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from run_helpers import StopAt, assert_same_run

from smallfry.data import load_data
from smallfry.errors import Stopped, UsageError
from smallfry.models import LoopNet
from smallfry.training.augment import Augment, random_crop, random_cutout, random_flip, whole
from smallfry.training.batches import TrainBatches
from smallfry.training.config import (
    AugmentConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from smallfry.training.evaluation import predict, score
from smallfry.training.optimization import build_optimizer, learning_rate
from smallfry.training.run import load_run
from smallfry.training.train import resume, train

NET = {"widths": [8, 12], "depths": [1, 1], "loops": [1, 2], "residual": True}
FAST = AugmentConfig(
    crop_padding=1, border="reflect", flip=True, flips="alternating", cutout=2, mixup=0, cutmix=0
)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.mark.parametrize("padding", [1, 3, 7])
def test_a_reflected_border_is_numpys(padding):
    images = torch.randint(0, 256, (1, 2, 8, 8), dtype=torch.uint8)
    wanted = np.pad(images[0], ((0, 0), (padding,) * 2, (padding,) * 2), mode="reflect")
    found = set()
    for _ in range(40):
        crop = random_crop(images, padding, border="reflect")[0]
        places = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if np.array_equal(crop, wanted[:, top : top + 8, left : left + 8])
        ]
        assert places
        found.add(places[0])
    assert len(found) > 4


def test_the_border_does_not_change_which_crops_are_drawn():
    images = torch.randint(1, 256, (16, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    black = random_crop(images, 2)
    torch.manual_seed(0)
    mirrored = random_crop(images, 2, border="reflect")
    inside = black > 0
    assert torch.equal(black[inside], mirrored[inside])
    assert inside.float().mean() > 0.5


def test_alternating_flips_show_each_image_both_ways_in_two_epochs(digits):
    augment = Augment(
        replace(FAST, crop_padding=0, cutout=0), 8, 10, digits.mean, digits.std, flip=False
    )
    batches = TrainBatches(digits.train, augment, 50, seed=3)
    first, second, third = {}, {}, {}
    for epoch, seen in enumerate((first, second, third)):
        for step in range(batches.steps_per_epoch):
            number = epoch * batches.steps_per_epoch + step
            rows = batches._order_of(epoch)[step * 50 + torch.arange(50)]
            seen |= dict(zip(rows.tolist(), batches[number].inputs, strict=True))
    both = first.keys() & second.keys() & third.keys()
    assert len(both) > 1000
    plain = augment.normalize(digits.train.take(torch.tensor(sorted(both))).images)
    mirrored = 0
    for row, image in zip(sorted(both), plain, strict=True):
        assert torch.equal(first[row].flip(-1), second[row])
        assert torch.equal(first[row], third[row])
        mirrored += not torch.equal(first[row], image)
    assert 0.4 < mirrored / len(both) < 0.6


def test_random_flips_are_what_they_were():
    images = torch.randint(0, 256, (32, 1, 4, 4), dtype=torch.uint8)
    torch.manual_seed(5)
    found = random_flip(images)
    torch.manual_seed(5)
    chosen = torch.rand(32) < 0.5
    assert torch.equal(found, torch.where(chosen[:, None, None, None], images.flip(-1), images))


@pytest.mark.parametrize("side", [1, 3, 4])
def test_cutout_blanks_one_square_anywhere(side):
    torch.manual_seed(0)
    images = torch.ones(400, 2, 8, 8)
    cut = random_cutout(images, side)
    blank = (cut == 0).all(1)
    assert torch.equal(cut == 0, blank[:, None].expand_as(cut))
    rows, columns = blank.any(2).sum(1), blank.any(1).sum(1)
    assert torch.equal(blank.sum((1, 2)), rows * columns)  # a rectangle
    assert rows.max() == columns.max() == side
    assert rows.min() >= (side + 1) // 2
    assert blank.float().mean(0).min() > 0  # everywhere
    assert torch.equal(images, torch.ones_like(images))


def test_cutout_of_a_part_of_a_batch_is_that_of_the_whole():
    images = torch.randn(6, 1, 8, 8)
    torch.manual_seed(1)
    wanted = random_cutout(images, 3)
    torch.manual_seed(1)
    part = random_cutout(images[2:4], 3, whole(images)._replace(rows=torch.tensor([2, 3])))
    assert torch.equal(part, wanted[2:4])


def test_sizes_grow_over_equal_parts_of_the_training(digits):
    augment = Augment(replace(FAST, sizes=[4, 6, 8]), 8, 10, digits.mean, digits.std, flip=True)
    batches = TrainBatches(digits.train, augment, 400, seed=0, epochs=3)
    sides = [batches[step].inputs.shape[-1] for step in range(3 * batches.steps_per_epoch)]
    assert sides == sorted([4, 6, 8] * batches.steps_per_epoch)
    assert batches[sides.index(6)].inputs.shape == (400, 1, 6, 6)


def test_sizes_are_refused_for_models_of_one_size(fast):
    vitrm = replace(fast, model=ModelConfig("vitrm_micro_patch4_8"), objective=ObjectiveConfig())
    with pytest.raises(UsageError, match=r"takes images of one size: leave out augment\.sizes"):
        train(vitrm)
    assert not fast.run.exists()


def test_a_linear_fall_makes_a_triangle():
    config = ScheduleConfig(warmup_epochs=2, min_lr=0.0, shape="linear")
    rates = [learning_rate(config, 3.0, step, 10, 8) for step in range(80)]
    assert rates[:20] == pytest.approx([3.0 * (step + 1) / 20 for step in range(20)])
    assert rates[19:] == pytest.approx([3.0 * (79 - step) / 60 for step in range(19, 80)])


def test_steps_divide_the_rate_after_their_epochs():
    settings = {"min_lr": 0.002, "shape": "steps", "milestones": [3, 5]}
    config = ScheduleConfig(warmup_epochs=1, **settings)
    rates = [learning_rate(config, 1.0, step, 10, 8) for step in range(80)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([1.0] * 20 + [0.1] * 20 + [0.01] * 30)
    lower = ScheduleConfig(0, 0.05, shape="steps", milestones=[1, 2])
    assert learning_rate(lower, 1.0, 79, 10, 8) == 0.05
    for wrong in ({"shape": "steps"}, {"milestones": [3]}):
        with pytest.raises(UsageError, match="go together"):
            ScheduleConfig(**wrong)
    with pytest.raises(UsageError, match="must be positive"):
        ScheduleConfig(shape="steps", milestones=[0])


def test_biases_and_shifts_have_a_rate_of_their_own():
    model = LoopNet(**NET)
    for decay in ("weights", "all"):
        config = OptimizerConfig("sgd", 0.1, 0.01, decay=decay, bias_rate=64.0)
        optimizer = build_optimizer(config, model)
        names = {id(p): name for name, p in model.named_parameters()}
        rates = {
            names[id(p)]: (g["lr_scale"], g["weight_decay"])
            for g in optimizer.param_groups
            for p in g["params"]
        }
        assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        for name, (scale, decayed) in rates.items():
            assert scale == (64.0 if name.endswith("bias") else 1.0)
            is_matrix = model.get_parameter(name).ndim > 1
            assert decayed == (0.01 if decay == "all" or is_matrix else 0.0)
    with pytest.raises(UsageError, match=r"leave out optimizer\.bias_rate"):
        build_optimizer(OptimizerConfig("kfac", bias_rate=2.0), model)


@pytest.fixture
def fast(tmp_path):
    return TrainConfig(
        data={"name": "digits", "limit": 200},
        model=ModelConfig("loopnet_2m", options=NET),
        augment=replace(FAST, sizes=[6, 8]),
        objective=ObjectiveConfig("cross_entropy", label_smoothing=0.1),
        optimizer=OptimizerConfig(
            "sgd", 0.1, 1e-3, bias_rate=8.0, clip=None, options={"momentum": 0.85}
        ),
        schedule=ScheduleConfig(1, 0.0, shape="linear"),
        epochs=4,
        batch_size=64,
        channels_last=True,
        test_flips=True,
        references=False,
        progress="quiet",
        run=tmp_path / "whole",
    )


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_fast_run_stopped_and_resumed_equals_an_undisturbed_one(fast, tmp_path, optimizer):
    if optimizer != "sgd":
        other = OptimizerConfig(optimizer, 1e-2, clip=None)
        fast = replace(fast, optimizer=other, precision="bf16-mixed")
    summary = train(fast)
    with pytest.raises(Stopped):
        train(replace(fast, run=tmp_path / "parted"), StopAt(5))
    assert resume(tmp_path / "parted")["measured"]["test"] == summary["measured"]["test"]
    assert_same_run(tmp_path / "whole", tmp_path / "parted")


def test_flips_at_test_time_are_named_and_can_be_had_again(fast, tmp_path, digits):
    measured = train(fast)["measured"]
    trained = load_run(fast.run)
    split = digits.test
    plain, flipped = (
        predict(trained.model, split, trained.normalize, flips=flips) for flips in (False, True)
    )
    mirrored = replace_pixels(split)
    other = predict(trained.model, mirrored, trained.normalize)
    torch.testing.assert_close(flipped.logits, (plain.logits + other.logits) / 2)
    assert measured["test"] == pytest.approx(score(plain))
    assert measured["test_flips"] == pytest.approx(score(flipped))
    assert json.loads((fast.run / "summary.json").read_text())["measured"].keys() >= {"test_flips"}
    assert (
        "test_flips" not in train(replace(fast, test_flips=False, run=tmp_path / "b"))["measured"]
    )


def replace_pixels(split):
    return type(split)(split.images.flip(-1), torch.arange(len(split)), split.labels)


def test_the_first_convolution_whitens_the_training_images_and_stays(fast):
    train(fast)
    trained = load_run(fast.run)
    images = torch.randn(2, 1, 8, 8)
    weight = trained.model.stem.weight
    half = len(weight) // 2
    torch.testing.assert_close(weight[:half], -weight[half:])
    assert trained.model(images).isfinite().all()
    fresh = LoopNet(in_chans=1, **NET)
    assert not torch.equal(fresh.stem.weight, weight)


def test_the_recipes_are_configurations():
    from pathlib import Path

    from smallfry.training.config import read_config

    files = sorted((Path(__file__).parents[2] / "recipes" / "fast").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        config = read_config(file)
        assert config.model.name == file.stem.partition("_cifar10")[0]
        assert yaml.safe_load(file.read_text())["schedule"]["shape"] == "linear"
