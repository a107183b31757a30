"""Resized crops, erasing, colours, policies, repeats, defaults, and the picture of a batch."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_images
from PIL import Image
from run_helpers import StopAt, assert_same_run
from torch.testing import assert_close
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from smallfry.cli import main
from smallfry.data import Split, load_data
from smallfry.errors import RunError, Stopped, UsageError
from smallfry.report.batch import draw_batch
from smallfry.tasks import create_task
from smallfry.training import augment_regions as regions
from smallfry.training.augment import Augment, Place, whole
from smallfry.training.augment_grids import build_augment
from smallfry.training.augment_policies import POLICIES, RandomPolicy, jitter_operations
from smallfry.training.batches import TrainBatches
from smallfry.training.config import (
    AugmentConfig,
    BalanceConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.default_settings import with_fitting_crop
from smallfry.training.show_batch import describe, show_batch
from smallfry.training.train import resume, train

PLAIN = AugmentConfig(crop_padding=0, flip=False, mixup=0.0, cutmix=0.0)
EVERYTHING = AugmentConfig(
    resized_crop=0.3, policy="autoaugment_cifar10", color_jitter=[0.4, 0.4, 0.4, 0.2], erasing=0.5
)


@pytest.fixture
def images():
    torch.manual_seed(3)
    return torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)


def batches(images, config, seed=0, rank=0, processes=1, size=8):
    labels = torch.arange(len(images)) % 5
    split = Split(images, torch.arange(len(images)), labels)
    augment = Augment(config, 32, 5, (0.5,) * 3, (0.25,) * 3, flip=True)
    return TrainBatches(split, augment, size, seed, rank, processes)


# Regions


def test_resized_crops_are_those_of_torchvision(images, monkeypatch):
    smooth = tv.gaussian_blur(images, [5, 5])
    seen = []

    def recorded(*arguments):
        seen.append(drawn(*arguments))
        return seen[-1]

    drawn = regions.draw_rectangles
    monkeypatch.setattr(regions, "draw_rectangles", recorded)
    found = regions.random_resized_crop(smooth, 0.1)
    boxes, fits = seen[0]
    assert fits.all()
    assert found.dtype == torch.uint8
    for image, cropped, box in zip(smooth, found, boxes.T.tolist(), strict=True):
        wanted = tv.resized_crop(image, *box, [32, 32], antialias=True)
        assert (wanted.int() - cropped.int()).abs().max() <= 1


def test_a_crop_of_the_whole_image_is_the_image(images):
    torch.manual_seed(0)
    same = regions.random_resized_crop(images, 1.0)
    unchanged = [torch.equal(a, b) for a, b in zip(images, same, strict=True)]
    assert sum(unchanged) >= 30  # the others have the ratio of 31 to 32


def test_rectangles_have_the_distribution_of_torchvision():
    torch.manual_seed(0)
    boxes, fits = regions.draw_rectangles(4000, 64, 64, (0.2, 1.0), regions.CROP_RATIO)
    _, _, high, wide = boxes[:, fits].double()
    crop, image = v2.RandomResizedCrop(64, scale=(0.2, 1.0)), torch.zeros(1, 64, 64)
    theirs = [crop.make_params([image]) for _ in range(2000)]
    their_area = torch.tensor([p["height"] * p["width"] for p in theirs]).double()
    their_ratio = torch.tensor([p["width"] / p["height"] for p in theirs]).double()
    assert fits.double().mean() > 0.99
    for quantile in (0.1, 0.5, 0.9):
        ours, other = (a.quantile(quantile).item() for a in (high * wide, their_area))
        assert ours == pytest.approx(other, rel=0.08)
        ours, other = (r.quantile(quantile).item() for r in (wide / high, their_ratio))
        assert ours == pytest.approx(other, rel=0.05)
    top, left = boxes[0], boxes[1]
    assert (top + boxes[2])[fits].max() <= 64
    assert (left + boxes[3])[fits].max() <= 64
    tiny, one = regions.draw_rectangles(9, 1, 1, (0.02, 0.3), regions.ERASED_RATIO)
    assert tiny[2:].min() >= 1 or not one.any()


def test_erasing_blanks_one_rectangle_of_some_images():
    torch.manual_seed(0)
    erased = regions.random_erasing(torch.ones(2000, 2, 20, 20), 0.25)
    assert torch.equal(erased[:, 0], erased[:, 1])
    blank = erased[:, 0] == 0
    some = blank.flatten(1).any(1)
    assert some.double().mean() == pytest.approx(0.25, abs=0.04)
    for each in blank[some]:
        rows, columns = each.any(1), each.any(0)
        assert torch.equal(each, rows[:, None] & columns[None, :])
        assert rows.nonzero().diff(dim=0).le(1).all()
        assert 0.01 < each.double().mean() < 0.37
    assert torch.equal(regions.random_erasing(torch.ones(4, 1, 9, 9), 0.0), torch.ones(4, 1, 9, 9))


# Colours and policies


def test_jitter_covers_the_range_of_torchvision(images):
    operations = jitter_operations([0.4, 0.0, 0.2, 0.5])
    assert [len(each) for each in operations] == [11, 11, 11]
    brightness, saturation, hue = operations
    assert torch.equal(brightness[0](images), tv.adjust_brightness(images, 0.6))
    assert torch.equal(brightness[5](images), images)
    assert torch.equal(brightness[-1](images), tv.adjust_brightness(images, 1.4))
    assert torch.equal(saturation[-1](images), tv.adjust_saturation(images, 1.2))
    assert torch.equal(hue[0](images), tv.adjust_hue(images, -0.5))
    assert jitter_operations([]) == []
    grey = images[:, :1]
    assert all(each(grey).shape == grey.shape for each in (*saturation, *hue))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_are_those_of_torchvision_image_by_image(name, channels, images):
    policy, images = RandomPolicy(name, 32), images[:6, :channels]
    torch.manual_seed(5)
    seeds = torch.randint(2**62, (6,)).tolist()
    wanted = []
    for image, seed in zip(images, seeds, strict=True):
        torch.manual_seed(seed)
        wanted.append(POLICIES[name]()(image))
    torch.manual_seed(5)
    found = policy(images)
    after = torch.rand(1)
    assert torch.equal(found, torch.stack(wanted))
    torch.manual_seed(5)
    part = policy(images[2:4], Place(torch.arange(2, 4), 6))  # of another process
    assert torch.equal(part, found[2:4])
    assert torch.equal(torch.rand(1), after)
    assert policy(images[:0], whole(images[:0])).shape == (0, channels, 32, 32)


# Batches


def test_batches_with_everything_are_functions_of_seed_and_step(images):
    made, other = batches(images, EVERYTHING), batches(images, EVERYTHING)
    wanted = made[3]
    _ = other[0], torch.rand(3)
    assert torch.equal(wanted.inputs, other[3].inputs)
    assert not torch.equal(wanted.inputs, batches(images, EVERYTHING, seed=1)[3].inputs)
    halves = [batches(images, EVERYTHING, 0, rank, 2)[3] for rank in (0, 1)]
    assert_close(torch.cat([half.inputs for half in halves]), wanted.inputs)


def test_repeats_put_an_image_into_a_batch_several_times(images):
    made = batches(images, replace(PLAIN, repeats=4))
    assert made.steps_per_epoch == 5
    seen = []
    for step in range(5):
        inputs = made[step].inputs.flatten(1)
        assert len(inputs.unique(dim=0)) == 2
        assert torch.equal(inputs[0], inputs[3])
        seen.append(inputs.unique(dim=0))
    assert len(torch.cat(seen).unique(dim=0)) == 10  # of 40, and others in the next epoch
    next_epoch = torch.cat([made[step].inputs.flatten(1) for step in range(5, 10)])
    assert not torch.equal(torch.cat(seen).unique(dim=0), next_epoch.unique(dim=0))
    changed = batches(images, replace(PLAIN, repeats=4, resized_crop=0.2))[0].inputs
    assert len(changed.flatten(1).unique(dim=0)) == 8


# Defaults


@pytest.fixture
def photographs(tmp_path, variant):
    for seed, name in enumerate("ab"):
        write_images(tmp_path / "photos" / name, 12, size=(70, 64), seed=seed)

    def make(**changes):
        settings = {
            "data": DataConfig(str(tmp_path / "photos"), image_size=64),
            "model": ModelConfig("resnet10t", options={"stem_width": 8}),
            "objective": ObjectiveConfig(),
            "augment": AugmentConfig(),
            "batch_size": 8,
        }
        return variant(**settings | changes)

    return make


@pytest.mark.slow
def test_a_run_with_everything_resumes_to_the_bit(variant, tmp_path):
    augment = replace(EVERYTHING, policy="autoaugment_svhn", repeats=2)
    train(variant(run=tmp_path / "whole", augment=augment))
    with pytest.raises(Stopped):
        train(variant(run=tmp_path / "parted", augment=augment), StopAt(4))
    file = tmp_path / "parted" / "config.yaml"
    written = file.read_text()
    file.write_text(written.replace("repeats: 2", "repeats: 1"))
    with pytest.raises(RunError, match=r"augment\.repeats 1, and the run was trained with 2"):
        resume(tmp_path / "parted")
    file.write_text(written)
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")


@pytest.mark.slow
def test_a_run_records_its_crop(photographs, tmp_path):
    with pytest.raises(Stopped):
        train(photographs(epochs=2_000), StopAt(1))  # few images, seen 20,000 times and more
    assert read_config(tmp_path / "run" / "config.yaml").augment.resized_crop == 0.25


# Picture of a batch


def test_the_picture_has_the_images_that_are_trained_on(photographs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("smallfry.training.show_batch.draw_batch", lambda *a: drawn.append(a))
    config = photographs(augment=AugmentConfig(resized_crop=0.0, crop_padding=0, flip=False))
    show_batch(config, tmp_path / "new" / "batch.png")
    images, shares, classes, title, file = drawn[0]
    assert (classes, file) == (("a", "b"), tmp_path / "new" / "batch.png")
    assert title == "crop_padding 0, flip False"
    assert images.shape == (16, 3, 64, 64)  # all whole batches
    assert_close(shares.sum(1), torch.ones(16))
    data = load_data(config.data.name, image_size=64)
    assert images.dtype == torch.uint8
    pure = photographs(augment=replace(config.augment, mixup=0.0, cutmix=0.0), data=config.data)
    show_batch(pure, tmp_path / "batch.png")
    known = {image.numpy().tobytes() for image in data.train.images}
    assert {image.numpy().tobytes() for image in drawn[1][0]} <= known
    assert describe(AugmentConfig()) == "default augmentation"


def test_the_command_draws_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["train", "--data.limit", "100", "--show_batch"]
    assert main([*asked, "--augment.randaugment_ops", "1"]) == 0
    assert capsys.readouterr().out == "images: batch.png\n"
    assert np.asarray(Image.open("batch.png")).std() > 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["batch.png"]
    assert main([*asked, "batch.jpg"]) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err
    assert main(["train", "--task", "puzzle", "--data", "sudoku4", "--show_batch"]) == 2
    assert "not of the task puzzle" in capsys.readouterr().err
    assert main(["train", "--resume", "x", "--show_batch"]) == 2
    assert "leave out resume" in capsys.readouterr().err


def test_a_picture_of_few_images_and_odd_names_is_drawn(tmp_path):
    shares = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.999, 0.001]])
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    draw_batch(images, shares, ["$_$", "a" * 60], "mixup $0.2", tmp_path / "b.png")
    assert np.asarray(Image.open(tmp_path / "b.png")).std() > 5


def test_the_picture_has_the_form_that_a_start_takes(tmp_path, monkeypatch, quiet_warnings):
    drawn = []
    monkeypatch.setattr("smallfry.training.show_batch.draw_batch", lambda *a: drawn.append(a))
    for seed, name in enumerate("abc"):
        write_images(tmp_path / "photos" / name, 8, size=(20, 20), seed=seed)
    start = Path(__file__).parents[1] / "fixtures" / "format_2" / "run"
    config = TrainConfig(
        data=DataConfig(str(tmp_path / "photos")),
        model=ModelConfig(start=str(start)),
        balance=BalanceConfig(sampler="balanced"),
        batch_size=6,
    )
    show_batch(config, tmp_path / "b.png")
    images, shares, classes, _, _ = drawn[0]
    assert images.shape[1:] == (1, 8, 8)  # of digits, which the start was trained on
    assert classes == ("a", "b", "c")
    assert shares.shape == (12, 3)
    with pytest.raises(UsageError, match="neither a folder nor a known data set"):
        show_batch(TrainConfig(data=DataConfig("nothing")), tmp_path / "b.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be written"):
        show_batch(config, tmp_path / "file" / "b.png")


def test_grids_of_symbols_have_no_crops_and_no_repeats():
    config = TrainConfig(data=DataConfig("sudoku4", options={"puzzles": 20}), task="puzzle")
    data = load_data("sudoku4", options={"puzzles": 20})
    task = create_task("puzzle")
    augment = build_augment(with_fitting_crop(config, 20, 64), data, task)
    assert augment.repeats == 1
    changed = replace(config, augment=AugmentConfig(erasing=0.5))
    with pytest.raises(UsageError, match="holds symbols, not images: leave out augment"):
        build_augment(changed, data, task)


# Wrong settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resized_crop": 1.5}, "augment.resized_crop is 0 to 1"),
        ({"resized_crop": -0.1}, "augment.resized_crop is 0 to 1"),
        ({"resized_crop": 0.3, "crop_padding": 4}, "excludes augment.crop_padding"),
        ({"policy": "randaugment"}, "augment.policy must be one of none, trivial, augmix"),
        ({"color_jitter": [0.1] * 5}, "up to 4 numbers from 0 to 1, the last at most 0.5"),
        ({"color_jitter": [1.2]}, "up to 4 numbers from 0 to 1"),
        ({"color_jitter": [0, 0, 0, 0.6]}, "the last at most 0.5"),
        ({"erasing": 2.0}, "augment.erasing is 0 to 1"),
        ({"repeats": 0}, "augment.repeats is 1 to 100"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        AugmentConfig(**settings)


def test_trivial_augment_is_refused_for_tiny_images():
    with pytest.raises(UsageError, match=r"by up to 32 pixels, and these have 8: take"):
        RandomPolicy("trivial", 8)
    RandomPolicy("trivial", 32)
    RandomPolicy("augmix", 8)
