"""The colour teacher: its features, its filter, and what it makes of generated views."""

import colorsys

import numpy as np
import pytest

from smallfry.errors import UsageError
from smallfry.kits.uav.teacher import ColourTeacher, majority, pixel_features, pseudo_label
from smallfry.kits.uav.views import ViewSettings, draw_view


def image_of(*colours):
    """Return an image of one row of colours, (3, 1, colours)."""
    return np.array(colours, np.uint8).T[:, None]


def test_hue_saturation_and_value_are_pythons():
    random = np.random.default_rng(0)
    colours = [*random.integers(0, 256, (50, 3)).tolist(), [0, 0, 0], [9, 9, 9], [255, 255, 255]]
    colours += [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 0, 200], [200, 100, 200]]
    found = pixel_features(image_of(*colours))[:, 3:6]
    wanted = [colorsys.rgb_to_hsv(*(value / 255 for value in each)) for each in colours]
    assert found == pytest.approx(np.array(wanted), abs=1e-12)


@pytest.mark.parametrize(
    ("colour", "a", "b"),
    [
        ((255, 0, 0), 80.09, 67.20),  # sRGB's primaries in CIELAB, D65
        ((0, 255, 0), -86.18, 83.18),
        ((0, 0, 255), 79.19, -107.86),
        ((255, 255, 255), 0.0, 0.0),
        ((0, 0, 0), 0.0, 0.0),
        ((5, 5, 5), 0.0, 0.0),
    ],
)
def test_a_and_b_are_those_of_cielab(colour, a, b):
    found = pixel_features(image_of(colour))[0, 6:8]
    assert found == pytest.approx([a, b], abs=0.03)


def test_the_row_is_a_feature():
    found = pixel_features(np.zeros((3, 4, 2), np.uint8))[:, 8]
    assert found.tolist() == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_the_majority_of_nine_wins():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, (7, 9))
    wanted = np.zeros_like(labels)
    for i in range(7):
        for j in range(9):
            near = labels[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            wanted[i, j] = np.bincount(near.ravel(), minlength=3).argmax()
    assert np.array_equal(majority(labels, 3), wanted)
    lonely = np.zeros((5, 5), np.int64)
    lonely[2, 2] = 1
    assert not majority(lonely, 2).any()


@pytest.fixture(scope="module")
def views():
    shown = [draw_view(ViewSettings(), "teacher", n, (24, 32))[0] for n in range(10)]
    return np.stack([v.pixels for v in shown]), np.stack([v.labels for v in shown])


@pytest.mark.parametrize("fast", [False, True])
def test_a_teacher_labels_what_it_has_learned(views, fast):
    images, labels = views
    teacher = ColourTeacher.fit(images, labels, fast=fast)
    found = pseudo_label(teacher, images)
    assert found.shape == labels.shape
    assert found.dtype == np.int64
    share = (found == labels).mean()
    usual = np.bincount(labels.ravel()).max() / labels.size
    assert share > usual + 0.15
    assert np.array_equal(teacher.label(images[3]), found[3])


def test_a_teacher_depends_on_its_seed_alone(views):
    images, labels = views
    one, again = (ColourTeacher.fit(images, labels, seed=1, fast=True) for _ in range(2))
    assert np.array_equal(one.label(images[0]), again.label(images[0]))


def test_any_model_of_masks_is_a_teacher():
    class Dark:
        def label(self, image):
            return (image.mean(axis=0) < 100).astype(np.int64)

    images = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 5), np.uint8)
    assert np.array_equal(pseudo_label(Dark(), images), images.mean(axis=1) < 100)


def test_wrong_examples_are_refused(views):
    images, labels = views
    with pytest.raises(UsageError, match=r"a label for each pixel, \(10, 24, 32\), got \(10,\)"):
        ColourTeacher.fit(images, labels[:, 0, 0])
    with pytest.raises(UsageError, match="pixels of two classes or more"):
        ColourTeacher.fit(images, np.zeros_like(labels))
