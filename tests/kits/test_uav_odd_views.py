"""Views, cameras and masks that are odd or wrong; and their geometry by loops."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.kits.uav.flight import ACTIONS
from smallfry.kits.uav.models import PilotNet
from smallfry.kits.uav.policy import UAVPolicy
from smallfry.kits.uav.rooms import FLOOR, SIZE, Pose, is_free, look, make_room
from smallfry.kits.uav.segmentation import (
    UAVSegmentation,
    confusion,
    intersection_over_union,
    soft_dice,
)
from smallfry.kits.uav.teacher import ColourTeacher, majority, pixel_features, pseudo_label
from smallfry.kits.uav.views import ViewSettings, draw_view
from smallfry_runtime.decoders import uav_policy
from smallfry_runtime.decoders.uav_segmentation import (
    AdaptiveScale,
    Camera,
    camera_of,
    clean_floor,
    decode,
    ground_depth,
    metric_scale,
)
from smallfry_runtime.errors import UsageError as RuntimeUsageError

CLASSES = ("other", "floor", "obstacle")
SHAPE = (24, 32)
CAMERA = Camera.of_view(SHAPE, 75, 1.1, 20)
EVERYWHERE = np.ones(SHAPE, bool)


def level(pitch=0.0, roll=0.0, height=1.1):
    return Camera(20.0, height, 15.5, 11.5, pitch, roll)


@pytest.mark.parametrize("pitch", [-20.0, 0.0, 15.0, 80.0])
@pytest.mark.parametrize("roll", [-30.0, 0.0, 10.0])
def test_the_floor_is_where_the_ray_of_a_pixel_has_sunk_by_the_height(pitch, roll):
    camera = level(pitch, roll)
    depth = ground_depth(camera, SHAPE)
    p, r = math.radians(pitch), math.radians(roll)
    for v, u in np.ndindex(SHAPE):
        x, y = (u - camera.cx) / camera.focal, (v - camera.cy) / camera.focal
        across, down = x * math.cos(r) - y * math.sin(r), x * math.sin(r) + y * math.cos(r)
        sinks = down * math.cos(p) + math.sin(p)  # metres downwards for a metre of depth
        assert across**2 + down**2 == pytest.approx(x**2 + y**2)
        if sinks > 0:
            assert depth[v, u] * sinks == pytest.approx(1.1)
        else:
            assert np.isinf(depth[v, u])
    row = camera.cy - camera.focal * math.tan(p) / math.cos(r)
    shifted = Camera(20.0, 1.1, 0.0, camera.cy - row, pitch, roll)
    assert ground_depth(shifted, (1, 1))[0, 0] > 1e9  # the horizon is infinitely far
    assert ground_depth(shifted, (2, 1))[1, 0] < 1000


@pytest.mark.parametrize("factor", [1e-3, 1.0, 250.0])
def test_a_scale_follows_the_unit_and_metres_follow_the_height(factor):
    depth = np.minimum(ground_depth(CAMERA, SHAPE), 50.0)
    found = metric_scale(depth / factor, EVERYWHERE, CAMERA)
    assert found.a == pytest.approx(factor)
    assert found.residual == pytest.approx(0, abs=1e-9)
    assert found.depth(depth / factor) == pytest.approx(depth)
    higher = Camera(CAMERA.focal, 2.2, CAMERA.cx, CAMERA.cy, 20)
    assert metric_scale(depth / factor, EVERYWHERE, higher).a == pytest.approx(2 * factor)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.0), (2.0, -0.1), (0.01, 0.3)])
def test_an_affine_inverse_depth_is_found_whatever_its_slope_and_offset(a, b):
    inverse = 1 / ground_depth(CAMERA, SHAPE)
    relative = (inverse - b) / a
    below = (relative > 0) & (inverse > 0.01)
    found = metric_scale(np.where(below, relative, -1), below, CAMERA, "inverse_affine")
    assert (found.a, found.b) == pytest.approx((a, b), abs=1e-9)
    assert found.depth(relative)[below] == pytest.approx(1 / inverse[below])


def test_unusable_depths_are_left_out_of_the_scale():
    depth = np.minimum(ground_depth(CAMERA, SHAPE), 50.0)
    broken = depth / 3
    broken[::4] = np.nan
    broken[1::4] = -1.0
    broken[2::4, ::2] = np.inf
    found = metric_scale(broken, EVERYWHERE, CAMERA)
    assert found.a == pytest.approx(3)
    assert found.pixels < metric_scale(depth / 3, EVERYWHERE, CAMERA).pixels
    assert metric_scale(np.full(SHAPE, np.nan), EVERYWHERE, CAMERA) is None
    assert metric_scale(depth, np.zeros(SHAPE, bool), CAMERA) is None


@pytest.mark.parametrize("count", [14, 15, 16, 17])
def test_a_scale_needs_two_percent_of_the_image(count):
    """Fifteen of 768 pixels are less, and sixteen are more."""
    depth = np.minimum(ground_depth(CAMERA, SHAPE), 50.0)
    relative = np.full(SHAPE, np.nan)
    relative.ravel()[-SHAPE[1] - 5 - count : -SHAPE[1] - 5] = 1.0
    found = metric_scale(np.where(np.isnan(relative), relative, depth), EVERYWHERE, CAMERA)
    assert (found is None) == (count < 16)
    assert found is None or found.pixels == count


def test_floor_that_grows_farther_with_inverse_depth_is_no_affine_model():
    inverse = 1 / np.minimum(ground_depth(CAMERA, SHAPE), 50.0)
    found = metric_scale(inverse.max() + 0.1 - inverse, EVERYWHERE, CAMERA, "inverse_affine")
    assert (found.b, found.model) == (0.0, "inverse_affine")
    assert found.a > 0


@pytest.mark.parametrize("seed", range(3))
def test_clean_floor_is_that_of_a_loop(seed):
    floor = np.random.default_rng(seed).random((9, 11)) < 0.85
    found = clean_floor(floor)
    for i, j in np.ndindex(floor.shape):
        near = floor[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        assert found[i, j] == (floor[i, j] and near.sum() >= 7)
    assert not clean_floor(np.ones((2, 9), bool)).any()


def test_there_is_no_scale_before_a_view_with_floor():
    depth = np.minimum(ground_depth(CAMERA, SHAPE), 50.0)
    assert AdaptiveScale().update(depth, ~EVERYWHERE, CAMERA) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"focal": 0}, "camera.focal .* and camera.height .* are positive, got 0"),
        ({"height": -1}, "are positive, got 20 and -1"),
        ({"focal": float("inf")}, "camera.focal is a finite number"),
        ({"cx": float("nan")}, "camera.cx is a finite number, got nan"),
        ({"cy": "12"}, "camera.cy is a number, got '12'"),
        ({"pitch": True}, "camera.pitch is a number, got True"),
        ({"pitch": 90}, "degrees between -90 and 90"),
        ({"roll": -90.0}, "degrees between -90 and 90"),
        ({"zoom": 2}, "camera has the settings focal, height, cx, cy, pitch, roll, got"),
    ],
)
def test_impossible_cameras_are_refused(changes, words):
    known = {"focal": 20, "height": 1, "cx": 15.5, "cy": 11.5}
    with pytest.raises(RuntimeUsageError, match=words):
        camera_of({**known, **changes})
    assert camera_of(known).roll == 0


@pytest.mark.parametrize("missing", ["focal", "height", "cx", "cy"])
def test_what_a_camera_lacks_is_named(missing):
    known = {"focal": 20, "height": 1, "cx": 15.5, "cy": 11.5}
    known.pop(missing)
    with pytest.raises(RuntimeUsageError, match=f"camera has no {missing}: without its focal"):
        decode(np.zeros((1, 3, 4, 4)), CLASSES, {"camera": known})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"camera": 3}, "camera has the settings focal, height"),
        ({"camera": []}, "camera has the settings focal, height"),
        ({"mask": 1}, "mask is true or false, got 1"),
        ({"depth": True}, "decoding has the settings camera and mask, not 'depth'"),
    ],
)
def test_settings_of_another_form_are_refused(settings, words):
    with pytest.raises(RuntimeUsageError, match=words):
        decode(np.zeros((1, 3, 4, 4)), CLASSES, settings)


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33])
def test_nearest_feet_are_those_of_a_loop_over_columns(width):
    labels = np.random.default_rng(width).integers(0, 3, (24, width))
    logits = np.moveaxis(np.eye(3)[labels], -1, 0)[None]
    camera = Camera(20.0, 1.1, (width - 1) / 2, 11.5, 10.0, 4.0)
    settings = {"camera": {"focal": 20, "height": 1.1, "cx": (width - 1) / 2, "cy": 11.5}}
    settings["camera"] |= {"pitch": 10.0, "roll": 4.0}
    (found,) = decode(logits, CLASSES, {**settings, "mask": True})
    assert found["mask"] == labels.tolist()
    assert found["shares"] == {
        name: pytest.approx((labels == number).mean()) for number, name in enumerate(CLASSES)
    }
    depth = ground_depth(camera, labels.shape)
    thirds = np.array_split(np.arange(width), 3)
    for name, columns in zip(("left", "middle", "right"), thirds, strict=True):
        feet = [
            depth[v, u]
            for u in columns
            for v in range(1, 24)
            if labels[v, u] == 1 and labels[v - 1, u] == 2 and np.isfinite(depth[v, u])
        ]
        assert found["obstacles"][name] == (pytest.approx(min(feet), abs=6e-4) if feet else None)


def test_masks_are_the_likeliest_classes_as_by_pytorch():
    logits = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    names = ("a", "b", "c", "d")
    found = decode(logits, names, {"mask": True})
    assert [each["mask"] for each in found] == torch.from_numpy(logits).argmax(1).tolist()
    assert decode(logits[:0], names) == []
    with pytest.raises(RuntimeUsageError, match="distances need the classes floor and obstacle"):
        decode(logits, names, {"camera": {"focal": 2, "height": 1, "cx": 2, "cy": 2}})


def test_actions_are_the_likeliest_as_by_pytorch():
    logits = 30 * np.random.default_rng(0).standard_normal((6, 4))
    shares = torch.from_numpy(logits).softmax(1).numpy()
    for kind in (np.float32, np.float64):
        for found, row in zip(uav_policy.decode(logits.astype(kind), ACTIONS), shares, strict=True):
            assert found["action"] == ACTIONS[row.argmax()]
            assert [*found["probabilities"].values()] == pytest.approx(row.tolist(), abs=1e-5)
    single = logits.astype(np.float32)
    wanted = uav_policy.decode(single, ACTIONS)
    assert UAVPolicy().decode(torch.from_numpy(single), ACTIONS) == wanted
    assert uav_policy.decode(logits[:0], ACTIONS) == []


@pytest.mark.parametrize("number", range(3))
def test_a_disc_is_free_where_no_wall_or_tall_box_is_within_its_radius(number):
    room = make_room(number)
    random = np.random.default_rng(number)
    for x, y in random.uniform([-0.2, -0.2], SIZE[:2] + 0.2, (40, 2)):
        inside = min(x, SIZE[0] - x, y, SIZE[1] - y) >= 0.2
        near = []
        for low, high in zip(room.low, room.high, strict=True):
            corner = np.clip([x, y], low[:2], high[:2])
            near.append(high[2] > 1.0 and math.dist(corner, (x, y)) < 0.2)
        assert is_free(room, x, y, 0.2, above=1.0) == (inside and not any(near))


def test_a_view_straight_at_a_wall_has_its_distance_at_every_pixel():
    room = make_room(0)._replace(low=np.full((8, 3), 9.0), high=np.full((8, 3), 9.1))  # outside
    camera = Camera(60.0, 1.2, 15.5, 11.5)
    view = look(room, Pose(3.0, 2.0, 0.0), camera, SHAPE)
    assert view.depth == pytest.approx(np.full(SHAPE, SIZE[0] - 3.0))
    assert (view.labels == 0).all()
    turned = look(room, Pose(3.0, 2.0, 90.0), camera, SHAPE)
    assert turned.depth == pytest.approx(np.full(SHAPE, SIZE[1] - 2.0))
    down = look(room, Pose(3.0, 2.0, 0.0), Camera(60.0, 1.2, 15.5, 11.5, pitch=80.0), SHAPE)
    assert (down.labels == FLOOR).all()
    assert down.depth == pytest.approx(ground_depth(Camera(60.0, 1.2, 15.5, 11.5, 80.0), SHAPE))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"views": 9}, "views is 10 to 1,000,000, got 9"),
        ({"labels": "mine"}, "labels is truth or teacher, got 'mine'"),
        ({"pitch": 61}, "pitch is 0 to 60 degrees, got 61"),
        ({"pitch": float("nan")}, "pitch is 0 to 60 degrees, got nan"),
        ({"views": 10, "seed": -1}, "seed is a whole number from 0"),
    ],
)
def test_impossible_settings_of_views_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        load_data("uav-rooms", options=settings, image_size=(8, 8))
    if "seed" in settings:
        with pytest.raises(UsageError, match=words):
            draw_view(ViewSettings(**settings), "train", 0, (8, 8))


@pytest.mark.parametrize("seed", range(3))
def test_the_majority_is_that_of_a_loop(seed):
    labels = np.random.default_rng(seed).integers(0, 4, (6, 7))
    found = majority(labels, 4)
    for i, j in np.ndindex(labels.shape):
        near = labels[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        assert found[i, j] == np.bincount(near.ravel(), minlength=4).argmax()


def test_a_class_that_the_chosen_pixels_miss_is_refused():
    pytest.importorskip("sklearn")
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 50, 60), np.uint8)
    labels = np.zeros((2, 50, 60), np.int64)
    chosen = np.random.default_rng(0).permutation(labels.size)
    labels.ravel()[chosen[-1]] = 1  # one pixel of 6,000, of which 3,000 are chosen
    with pytest.raises(UsageError, match="needs pixels of two classes or more"):
        ColourTeacher.fit(images, labels, fast=True)
    labels[:, :, ::2] = 1
    images[:, :, :, ::2] = 0
    teacher = ColourTeacher.fit(images, labels, fast=True)
    masks = pseudo_label(teacher, images)
    assert masks.shape == labels.shape
    assert teacher.classes == 2


def test_grey_pixels_have_no_hue_saturation_or_colour():
    grey = np.broadcast_to(np.arange(0, 256, 5, dtype=np.uint8), (3, 1, 52))
    found = pixel_features(grey)
    assert found.shape == (52, 9)
    assert (found[:, 3:5] == 0).all()
    assert found[:, 5] == pytest.approx(grey[0, 0] / 255)
    assert np.abs(found[:, 6:8]).max() < 0.02
    assert (found[:, 8] == 0).all()


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dice_and_losses_forget_the_order_of_pixels_and_the_batch():
    logits = noise(0, 3, 3, 4, 5)
    labels = torch.randint(0, 3, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    losses = UAVSegmentation().losses(logits, labels)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    mixed = logits.flatten(2)[:, :, order].view_as(logits)
    moved = labels.flatten(1)[:, order].view_as(labels)
    assert_close(UAVSegmentation().losses(mixed, moved), losses)
    for i in range(3):
        own = slice(i, i + 1)
        assert_close(UAVSegmentation().losses(logits[own], labels[own])[0], losses[i])
        shares, truth = logits[i].softmax(0), torch.stack([labels[i] == k for k in range(3)])
        each = (2 * (shares * truth).sum((1, 2)) + 1) / ((shares + truth * 1.0).sum((1, 2)) + 1)
        assert soft_dice(logits[own], labels[own])[0].item() == pytest.approx(each.mean().item())


def test_confusion_counts_pixels_and_a_class_nowhere_has_no_score():
    found, labels = torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[0, 0], [1, 1]]])
    table = confusion(found, labels, 3)
    assert table.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    scores = intersection_over_union(table)
    assert scores[:2].tolist() == [0.5, pytest.approx(2 / 3)]
    assert scores[2].isnan()


@pytest.mark.parametrize("side", [16, 17])
def test_the_smallest_picture_of_a_policy_has_17_pixels(side):
    if side < 17:
        with pytest.raises(UsageError, match="takes images of 17 pixels and more, not 16×16"):
            PilotNet(side)
    else:
        assert PilotNet(side).eval()(torch.zeros(1, 7, side, side)).shape == (1, 4)
