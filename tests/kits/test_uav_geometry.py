"""Geometry of the floor: depth in closed form, and the scale of relative depth."""

import math
from dataclasses import replace

import numpy as np
import pytest

from smallfry.errors import UsageError
from smallfry_runtime.decoders.uav_segmentation import (
    FARTHEST,
    AdaptiveScale,
    Camera,
    clean_floor,
    decode,
    ground_depth,
    metric_scale,
)

GOLDEN = Camera(focal=200.0, height=1.2, cx=79.5, cy=59.5, pitch=20)
LEVEL = Camera.of_view((48, 64), 75.0, 1.0, 15.0)
SHAPE = (48, 64)
CLASSES = ("other", "floor", "obstacle")


def plane_by_rays(camera, shape):
    """Intersect the ray of each pixel with the floor, turning vectors one by one."""
    pitch, roll = math.radians(camera.pitch), math.radians(camera.roll)
    found = np.full(shape, np.inf)
    for v in range(shape[0]):
        for u in range(shape[1]):
            x, y = (u - camera.cx) / camera.focal, (v - camera.cy) / camera.focal
            # roll about the axis: right dips; then pitch about the right axis: the axis dips
            side = x * math.cos(roll) - y * math.sin(roll)
            down = x * math.sin(roll) + y * math.cos(roll)
            sinks = down * math.cos(pitch) + math.sin(pitch)
            assert math.hypot(side, down) == pytest.approx(math.hypot(x, y))
            if sinks > 0:
                found[v, u] = camera.height / sinks
    return found


@pytest.mark.parametrize(
    ("row", "depth"),
    [
        (0, 19.211807226),
        (30, 5.899255994),
        (59, 3.532831215),
        (60, 3.484630422),
        (90, 2.472578751),
        (119, 1.930568090),
    ],
)
def test_the_depth_of_the_floor_is_the_golden_one(row, depth):
    found = ground_depth(GOLDEN, (120, 160))
    assert found[row] == pytest.approx(np.full(160, depth), abs=1e-9)


def horizon_row(camera):
    """Row of the horizon in the column of the optical axis."""
    roll = math.cos(math.radians(camera.roll))
    return camera.cy - camera.focal * math.tan(math.radians(camera.pitch)) / roll


def test_the_horizon_is_where_the_floor_ends():
    camera = replace(LEVEL, pitch=5.0)
    found = ground_depth(camera, SHAPE)
    row = horizon_row(camera)
    assert np.isinf(found[: math.floor(row) + 1]).all()
    assert np.isfinite(found[math.ceil(row) :]).all()
    rolled = replace(camera, roll=20.0, cx=0.0)
    column, row = ground_depth(rolled, (48, 1))[:, 0], horizon_row(rolled)
    assert np.isinf(column[math.floor(row)])
    assert np.isfinite(column[math.ceil(row)])


@pytest.mark.parametrize("roll", [0.0, 7.0, -25.0])
@pytest.mark.parametrize("pitch", [0.0, 15.0, 40.0])
def test_the_depth_of_the_floor_is_that_of_its_rays(roll, pitch):
    camera = replace(LEVEL, roll=roll, pitch=pitch)
    found, wanted = ground_depth(camera, SHAPE), plane_by_rays(camera, SHAPE)
    assert (np.isinf(found) == np.isinf(wanted)).all()
    near = wanted < 10
    assert np.abs(found[near] - wanted[near]).max() <= 1e-12
    assert 1 / found == pytest.approx(1 / wanted, abs=1e-12)


def test_the_right_side_dips_with_positive_roll():
    found = ground_depth(replace(LEVEL, roll=10.0), SHAPE)
    assert found[40, 60] < found[40, 3]


def test_a_camera_of_an_angle_sees_that_angle():
    camera = Camera.of_view((48, 64), 90.0, 1.0, 0.0)
    assert camera.focal == pytest.approx(32.0)
    assert (camera.cx, camera.cy) == (31.5, 23.5)
    left = math.degrees(math.atan((camera.cx + 0.5) / camera.focal))
    assert left == pytest.approx(45.0)


def floor_of(camera, shape=SHAPE, rows=20):
    """Return floor in the lower rows, and its depth everywhere (a wall above it)."""
    floor = np.zeros(shape, bool)
    floor[-rows:] = True
    depth = ground_depth(camera, shape)
    depth = np.where(floor, depth, np.minimum(depth, 4.0))
    return floor, depth


@pytest.mark.parametrize("roll", [0.0, 9.0])
def test_the_scale_is_found_without_noise(roll):
    camera = replace(LEVEL, roll=roll)
    floor, depth = floor_of(camera)
    found = metric_scale(depth / 1.7, floor, camera)
    assert found.a == pytest.approx(1.7, abs=1e-9)
    assert found.residual <= 1e-9
    assert found.pixels == clean_floor(floor).sum()
    assert np.abs(found.depth(depth / 1.7) - depth).max() <= 1e-9


@pytest.mark.parametrize("roll", [0.0, 9.0])
def test_inverse_affine_depth_is_found_without_noise(roll):
    camera = replace(LEVEL, roll=roll)
    floor, depth = floor_of(camera)
    a, b = 0.6, 0.15
    found = metric_scale((1 / depth - b) / a, floor, camera, "inverse_affine")
    assert (found.a, found.b) == pytest.approx((a, b), abs=1e-9)
    assert found.model == "inverse_affine"
    assert np.abs(found.depth((1 / depth - b) / a) - depth).max() <= 1e-9


def test_inverse_affine_depth_is_robust_to_wrong_labels():
    floor, depth = floor_of(LEVEL)
    random = np.random.default_rng(0)
    inverse = (1 / depth - 0.15) / 0.6
    wrong = floor & (random.random(SHAPE) < 0.05)
    inverse[wrong] *= 2
    found = metric_scale(inverse, floor, LEVEL, "inverse_affine")
    assert (found.a, found.b) == pytest.approx((0.6, 0.15), abs=0.01)


def test_the_inverse_affine_fit_is_guarded():
    floor, depth = floor_of(LEVEL, rows=4)  # 124 clean pixels, of a small span
    narrow = metric_scale(1 / depth, floor, LEVEL, "inverse_affine")
    assert (narrow.b, narrow.a) == pytest.approx((0.0, 1.0))
    floor, depth = floor_of(LEVEL)
    falling = metric_scale(3 - 1 / depth, floor, LEVEL, "inverse_affine")  # a would be negative
    assert falling.b == 0.0
    assert falling.a > 0
    flat = metric_scale(np.ones(SHAPE), floor, LEVEL, "inverse_affine")  # a would be 0 / 0
    assert math.isfinite(flat.a)
    assert flat.depth(np.zeros(SHAPE)).max() == FARTHEST


def test_a_view_without_floor_has_no_scale():
    floor, depth = floor_of(LEVEL, rows=1)
    assert metric_scale(depth, floor, LEVEL) is None
    assert metric_scale(depth, np.zeros(SHAPE, bool), LEVEL) is None
    up = replace(LEVEL, pitch=-60.0)  # floor above the horizon can't be
    assert metric_scale(depth, np.ones(SHAPE, bool), up) is None


def test_a_clean_pixel_has_seven_neighbours_of_nine():
    random = np.random.default_rng(1)
    floor = random.random((9, 11)) < 0.85
    wanted = np.zeros_like(floor)
    for i in range(9):
        for j in range(11):
            near = floor[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            wanted[i, j] = floor[i, j] and near.sum() >= 7
    assert (clean_floor(floor) == wanted).all()
    assert wanted.any()


def test_single_mislabelled_pixels_set_no_scale():
    random = np.random.default_rng(2)
    scattered = random.random(SHAPE) < 0.2
    assert scattered.sum() > 0.02 * scattered.size
    assert metric_scale(np.ones(SHAPE), scattered, LEVEL) is None


def test_the_scale_over_time_is_the_median_of_five_and_is_kept():
    floor, depth = floor_of(LEVEL)
    state = AdaptiveScale()
    assert state.update(depth, np.zeros(SHAPE, bool), LEVEL) is None
    for scale in (1.0, 5.0, 1.2, 1.1, 0.1, 1.3):
        found = state.update(depth / scale, floor, LEVEL)
    assert found.a == pytest.approx(1.2)  # of 5, 1.2, 1.1, 0.1 and 1.3
    assert state.update(depth, np.zeros(SHAPE, bool), LEVEL) == found


def test_wrong_arrays_are_refused():
    floor, depth = floor_of(LEVEL)
    with pytest.raises(UsageError, match="model is scale or inverse_affine, not 'affine'"):
        metric_scale(depth, floor, LEVEL, "affine")
    with pytest.raises(UsageError, match=r"of one image, got \(48, 63\) and \(48, 64\)"):
        metric_scale(depth[:, 1:], floor, LEVEL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"focal": 0.0}, "camera.focal .pixels. and camera.height .metres. are positive"),
        ({"height": -1.0}, "got 41.7.* and -1"),
        ({"focal": None}, "camera.focal is a number, got None"),
        ({"height": True}, "camera.height is a number, got True"),
        ({"cx": math.nan}, "camera.cx is a finite number"),
        ({"pitch": 90.0}, "degrees between -90 and 90"),
    ],
)
def test_an_impossible_camera_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        replace(LEVEL, **changes)


def logits_of(labels, classes=3):
    return np.stack([(labels == c) * 9.0 for c in range(classes)])[None]


def test_distances_are_measured_at_the_feet_of_obstacles():
    labels = np.zeros(SHAPE, np.int64)
    labels[20:] = 1
    labels[10:30, 5:12] = 2  # left: a foot in row 30
    labels[10:, 40:45] = 2  # right, middle: down to the edge, its foot is out of view
    camera = {"focal": 41.7, "cx": 31.5, "cy": 23.5, "height": 1.0, "pitch": 15.0}
    (found,) = decode(logits_of(labels), CLASSES, {"camera": camera, "mask": True})
    wanted = ground_depth(Camera(**camera), SHAPE)[30, 5]
    assert found["obstacles"] == {
        "left": pytest.approx(wanted, abs=1e-3),
        "middle": None,
        "right": None,
    }
    assert found["mask"] == labels.tolist()
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert found["shares"]["floor"] == pytest.approx((labels == 1).mean())
    assert {*decode(logits_of(labels), CLASSES)[0]} == {"shares"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"camera": {"height": 1.0}}, "camera has no focal, cx, cy: without its focal length"),
        ({"camera": {"focal": 40, "cx": 31, "cy": 23}}, "camera has no height"),
        ({"camera": {"f": 40}}, "camera has the settings focal, height, cx, cy, pitch, roll"),
        ({"camera": 40}, "camera has the settings focal"),
        ({"mask": "yes"}, "mask is true or false, got 'yes'"),
        ({"depth": 1}, "decoding has the settings camera and mask, not 'depth'"),
    ],
)
def test_a_camera_without_intrinsics_is_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        decode(logits_of(np.zeros(SHAPE, np.int64)), CLASSES, settings)


def test_distances_need_floor_and_obstacles():
    camera = {"focal": 41.7, "cx": 31.5, "cy": 23.5, "height": 1.0}
    with pytest.raises(UsageError, match="distances need the classes floor and obstacle"):
        decode(logits_of(np.zeros(SHAPE, np.int64)), ("a", "b", "c"), {"camera": camera})
