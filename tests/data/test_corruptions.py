"""Corruptions are seeded for each image, grow with severity, and keep what they should."""

import subprocess
import sys

import pytest
import torch

from smallfry.data.corruptions import BENCHMARK, CORRUPTIONS, EXTRA, SETS, corrupt
from smallfry.errors import UsageError

DIGEST = """
import hashlib, torch
from smallfry.data.corruptions import CORRUPTIONS, corrupt
images = (torch.arange(2 * 3 * 32 * 32) * 7 % 256).to(torch.uint8).view(2, 3, 32, 32)
made = [corrupt(images, name, 4, seed=3) for name in CORRUPTIONS]
digest = hashlib.sha256(torch.stack(made).numpy().tobytes()).hexdigest()
"""
# not in order by design, or of kinds that change between severities
UNORDERED = {"saturate", "glass_blur", "elastic", "spatter_like", "snow", "motion_blur", "pixelate"}


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures with edges, such as photographs have."""
    draw = torch.Generator().manual_seed(0)
    rough = torch.rand(12, 3, 5, 5, generator=draw)
    smooth = torch.nn.functional.interpolate(rough, 32, mode="bicubic").clamp(0, 1)
    smooth[:, :, 8:14, 6:25] *= 0.4
    return (smooth * 255).to(torch.uint8)


def change(before, after):
    return float((after.double() - before.double()).abs().mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_image_depends_on_the_seed_and_its_number_alone(name, pictures):
    some = pictures[:4]
    found = corrupt(some, name, 3, seed=1)
    assert found.dtype == torch.uint8
    assert found.shape == some.shape
    assert torch.equal(found[2:], corrupt(some[2:], name, 3, seed=1, first=2))
    assert torch.equal(corrupt(some, name, 0), some)
    assert change(some, found) > 0.3


@pytest.mark.slow
def test_processes_agree_to_the_bit():
    here = {}
    exec(DIGEST, here)
    call = [sys.executable, "-c", f"{DIGEST}print(digest)"]
    there = subprocess.run(call, capture_output=True, check=True, text=True).stdout
    assert there.strip() == here["digest"]


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in UNORDERED])
def test_changes_grow_with_severity(name, pictures):
    found = [change(pictures, corrupt(pictures, name, severity)) for severity in range(6)]
    assert found == sorted(found)
    assert len(set(found)) == 6


def test_others_end_stronger_than_they_begin(pictures):
    for name in ("motion_blur", "snow", "pixelate"):
        weak, strong = (change(pictures, corrupt(pictures, name, s)) for s in (1, 5))
        assert strong > 1.5 * weak


def test_noise_has_its_standard_deviation_within_two_percent():
    grey = torch.full((6, 3, 64, 64), 127, dtype=torch.uint8)
    for name, sigmas in (("gaussian_noise", (0.04, 0.1)), ("speckle_noise", (0.06, 0.2))):
        for severity, sigma in zip((1, 5), sigmas, strict=True):
            made = corrupt(grey, name, severity).double() / 255
            factor = 1 if name == "gaussian_noise" else 127 / 255
            assert float(made.std()) == pytest.approx(sigma * factor, rel=0.02)
    shot = corrupt(grey, "shot_noise", 5).double() / 255
    assert float(shot.std()) == pytest.approx((127 / 255 / 50) ** 0.5, rel=0.02)
    salted = corrupt(grey, "impulse_noise", 5)
    assert float((salted == 255).double().mean()) == pytest.approx(0.035, rel=0.1)
    assert float((salted == 0).double().mean()) == pytest.approx(0.035, rel=0.1)


def test_contrast_keeps_the_means_of_channels(pictures):
    made = corrupt(pictures, "contrast", 3)
    before, after = (each.double().mean(dim=(2, 3)) for each in (pictures, made))
    assert float((before - after).abs().max()) <= 1


def test_brightness_and_saturation_keep_the_hue_of_a_pixel():
    pixel = torch.tensor([120, 60, 30], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)
    lit = corrupt(pixel, "brightness", 5)[0, :, 0, 0]
    assert lit.tolist() == [196, 98, 49]  # V from 120 to 196.5, ratios as before
    dull = corrupt(pixel, "saturate", 1)[0, :, 0, 0]
    assert dull.tolist() == [120, 102, 93]  # 30 % of the distances to V
    assert corrupt(torch.zeros_like(pixel), "brightness", 2)[0, :, 0, 0].tolist() == [25, 25, 25]
    grey = torch.full_like(pixel, 100)
    assert corrupt(grey, "saturate", 4)[0, :, 0, 0].tolist() == [100, 90, 90]  # hue 0


def test_blurs_keep_an_even_picture_and_its_sum():
    even = torch.full((1, 3, 32, 32), 80, dtype=torch.uint8)
    for name in ("defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"):
        assert change(even, corrupt(even, name, 5)) <= 1
    point = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    point[:, :, 16, 16] = 255
    for name in ("defocus_blur", "motion_blur"):
        made = corrupt(point, name, 5).double()
        assert float(made[0, 0].sum()) == pytest.approx(255, rel=0.08)  # rounded down
        assert float(made.max()) < 140


def test_grey_and_wide_images_are_taken(pictures):
    grey = pictures[:2, :1, :20, :28]
    for name in CORRUPTIONS:
        assert corrupt(grey, name, 2).shape == (2, 1, 20, 28)


def test_sets_and_wrong_names():
    assert len(BENCHMARK) == 15
    assert len(EXTRA) == 4
    assert {name for name, _ in SETS["full"]} == set(BENCHMARK)
    assert len(SETS["full"]) == 75
    assert len(SETS["quick"]) == 18
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UsageError, match="unknown corruption 'fogg'; did you mean 'fog'"):
        corrupt(images, "fogg", 1)
    with pytest.raises(UsageError, match="severity is 0 to 5, not 6"):
        corrupt(images, "fog", 6)
