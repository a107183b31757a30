"""Whole batches go through what torchvision does to single images."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode, v2

from smallfry.training.augment import (
    Augment,
    Normalize,
    apply_one_of,
    rand_augment_operations,
    random_crop,
    random_flip,
)
from smallfry.training.config import AugmentConfig


@settings(max_examples=8, deadline=None)
@given(
    magnitude=st.integers(0, 30), size=st.sampled_from([8, 32]), channels=st.sampled_from([1, 3])
)
def test_each_operation_is_torchvisions_on_every_image(magnitude, size, channels):
    theirs = v2.RandAugment()
    operations = rand_augment_operations(magnitude, size)
    names = [(name, sign) for sign in (1, -1) for name in theirs._AUGMENTATION_SPACE]
    images = torch.randint(0, 256, (3, channels, size, size), dtype=torch.uint8)
    images[0] //= 8  # of little contrast
    assert len(operations) == len(names) == 28
    for (name, sign), operation in zip(names, operations, strict=True):
        magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
        values = magnitudes(31, size, size)
        value = 0.0 if values is None else float(values[magnitude]) * (sign if signed else 1)
        done = operation(images)
        for image, found in zip(images, done, strict=True):
            wanted = theirs._apply_image_or_video_transform(
                image, name, value, InterpolationMode.NEAREST, theirs._fill
            )
            assert found.dtype == torch.uint8
            apart = (found.int() - wanted.int()).abs() > 1  # a rounding; more is another place
            if name == "Solarize":  # the threshold itself, which they compute in float32
                apart &= (image - 255 * value).abs() > 1e-3
            assert apart.float().mean() < 0.02, (name, sign)


def test_augmentation_can_be_sent_to_a_worker_process():
    config = AugmentConfig(crop_padding=2, flip=True, randaugment_ops=2)
    augment = Augment(config, 8, 2, (0.5,) * 3, (0.25,) * 3, flip=True)
    sent = pickle.loads(pickle.dumps(augment))
    images, labels = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8), torch.arange(9) % 2
    made = []
    for each in (augment, sent):
        torch.manual_seed(3)
        made.append(each(images, labels))
    assert_close(*made)


def test_all_operations_are_equally_likely_and_images_keep_their_places():
    marks = [lambda images, mark=mark: images + mark for mark in range(28)]
    images = 100 * torch.arange(2).repeat(14_000)
    done = apply_one_of(images, marks)
    assert torch.equal(done // 100, images // 100)
    counts = torch.bincount(done % 100, minlength=28)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_crops_are_equally_likely_windows_of_the_padded_image():
    image = torch.arange(1, 37, dtype=torch.uint8).view(1, 6, 6)
    padded = torch.nn.functional.pad(image, (2,) * 4)
    windows = {
        tuple(padded[0, i : i + 6, j : j + 6].flatten().tolist())
        for i in range(5)
        for j in range(5)
    }
    crops = random_crop(image.expand(10_000, -1, -1, -1), 2).flatten(1)
    found, counts = crops.unique(dim=0, return_counts=True)
    assert {tuple(row) for row in found.tolist()} == windows
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_half_of_the_images_are_mirrored():
    image = torch.arange(9, dtype=torch.uint8).view(1, 3, 3)
    flipped = random_flip(image.expand(10_000, -1, -1, -1))
    mirrored = (flipped == image.flip(-1)).flatten(1).all(1)
    assert ((flipped == image).flatten(1).all(1) | mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_whole_of_it_has_the_distribution_of_torchvisions_pipeline():
    image = torch.rand(3, 8, 8).cumsum(2).mul(30).to(torch.uint8)
    config = AugmentConfig(crop_padding=2, flip=True, randaugment_ops=2, mixup=0.0, cutmix=0.0)
    augment = Augment(config, 8, 2, (0.0,) * 3, (1 / 255,) * 3, flip=False)
    pipeline = v2.Compose(
        [v2.RandomCrop(8, padding=2), v2.RandomHorizontalFlip(), v2.RandAugment(2, 9)]
    )
    images = image.expand(2000, -1, -1, -1)
    ours = augment(images, torch.zeros(2000, dtype=torch.int64)).inputs
    theirs = torch.stack([pipeline(image) for image in images]).float()
    for statistic in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: x[:, 0, 3, 4],
        lambda x: x[:, 2, 0, 7],
    ):
        assert ks_2samp(statistic(ours).numpy(), statistic(theirs).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("alphas", "expected"), [((1.0, 0.0), {"mixup"}), ((0.0, 1.0), {"cutmix"}), ((1.0, 1.0), None)]
)
def test_mixup_blends_pixels_and_cutmix_pastes_them(alphas, expected):
    mixup, cutmix = alphas
    config = AugmentConfig(crop_padding=0, flip=False, mixup=mixup, cutmix=cutmix)
    augment = Augment(config, 8, 2, (0.0,), (1 / 255,), flip=False)
    images = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    seen = set()
    for _ in range(20):
        values = augment(images, torch.tensor([0, 1])).inputs.unique().tolist()
        between = any(1 < value < 199 for value in values)
        seen.add("mixup" if between else "cutmix")
    assert seen == (expected or {"mixup", "cutmix"})


def test_crops_and_flips_only_move_pixels():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    augment = Augment(
        AugmentConfig(crop_padding=1, flip=True, mixup=0.0), 8, 2, (0.0,), (1 / 255,), flip=False
    )
    moved = augment(images, torch.zeros(200, dtype=torch.int64)).inputs.round().long()
    centres = {tuple(row) for row in moved[:, 0, 4, 3:5].tolist()}
    assert len(centres) == 18  # 9 shifts, mirrored or not


@pytest.mark.parametrize(("size", "padding"), [(8, None), (32, 4)])
def test_the_default_crop_pads_an_eighth_but_not_tiny_images(size, padding):
    augment = Augment(AugmentConfig(flip=False), size, 2, (0.5,), (0.5,), flip=False)
    assert [step.keywords["padding"] for step in augment.steps] == ([padding] if padding else [])


def test_normalize_is_shift_and_scale_of_the_unit_range():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert_close(Normalize((0.5,), (0.25,))(images).flatten(), torch.tensor([-2.0, 2.0]))
