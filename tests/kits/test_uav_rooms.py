"""Generated rooms: exact depth and labels, splits without a common room, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.kits.uav.rooms import (
    CLASSES,
    FLOOR,
    OBSTACLE,
    OTHER,
    SIZE,
    Pose,
    is_free,
    look,
    make_room,
    random_of,
)
from smallfry.kits.uav.views import SHAPE, ViewSettings, draw_view
from smallfry_runtime.decoders.uav_segmentation import Camera, ground_depth

CAMERA = Camera.of_view(SHAPE, 75.0, 1.0, 15.0)
SMALL = (12, 16)
SMALL_CAMERA = Camera.of_view(SMALL, 75.0, 1.0, 15.0)


def march(room, origin, ray):
    """Follow a ray in steps of 2 mm to what it hits first: (depth, label)."""
    length = np.linalg.norm(ray)
    for t in np.arange(0, 12, 0.002 / length):
        x, y, z = at = origin + t * ray
        inside = (at >= room.low).all(axis=1) & (at <= room.high).all(axis=1)
        if inside.any():
            return t, OBSTACLE
        if z <= 0:
            return t, FLOOR
        if x <= 0 or y <= 0 or x >= SIZE[0] or y >= SIZE[1] or z >= SIZE[2]:
            return t, OTHER
    raise AssertionError("a ray that leaves the room")


@pytest.mark.parametrize("number", range(3))
def test_depth_and_labels_are_those_of_rays_followed_step_by_step(number):
    room = make_room(number)
    pose = room.start
    view = look(room, pose, SMALL_CAMERA, SMALL)
    turn, pitch = math.radians(pose.yaw), math.radians(SMALL_CAMERA.pitch)
    forward = np.array([math.cos(turn) * math.cos(pitch), math.sin(turn) * math.cos(pitch), 0])
    forward[2] = -math.sin(pitch)
    right = np.array([math.sin(turn), -math.cos(turn), 0])
    down = np.array([-math.cos(turn) * math.sin(pitch), -math.sin(turn) * math.sin(pitch), 0])
    down[2] = -math.cos(pitch)
    origin = np.array([pose.x, pose.y, 1.0])
    for v in range(1, SMALL[0], 5):
        for u in range(0, SMALL[1], 5):
            x = (u - SMALL_CAMERA.cx) / SMALL_CAMERA.focal
            y = (v - SMALL_CAMERA.cy) / SMALL_CAMERA.focal
            depth, label = march(room, origin, forward + x * right + y * down)
            assert view.depth[v, u] == pytest.approx(depth, abs=0.003)
            assert view.labels[v, u] == label


@pytest.mark.parametrize("roll", [0.0, 12.0])
def test_depth_of_the_floor_is_that_of_its_plane(roll):
    camera = replace(CAMERA, roll=roll)
    room = make_room(1)
    view = look(room, room.start, camera)
    floor = view.labels == FLOOR
    assert floor.mean() > 0.1
    assert np.abs(view.depth - ground_depth(camera, SHAPE))[floor].max() <= 1e-12
    assert (view.depth <= ground_depth(camera, SHAPE) + 1e-12).all()


def test_a_room_holds_eight_boxes_apart_from_each_other_and_the_start():
    for number in range(30):
        room = make_room(number)
        assert len(room.low) == 8
        assert (room.low >= 0).all()
        assert (room.high <= SIZE).all()
        sides = (room.high - room.low)[:, :2]
        assert sides.min() >= 0.25
        assert sides.max() <= 0.5
        assert 0.6 <= room.high[:, 2].min() <= room.high[:, 2].max() <= 1.6
        assert is_free(room, room.start.x, room.start.y, 0.6)
        assert is_free(room, room.start.x, room.start.y, 0.59)
        for i in range(8):
            for j in range(i):
                gap = np.maximum(room.low[i] - room.high[j], room.low[j] - room.high[i])[:2]
                assert gap.max() >= 0.1


def test_a_disc_touches_walls_and_tall_boxes():
    room = make_room(0)
    box = int(room.high[:, 2].argmin())
    x, y = ((room.low + room.high) / 2)[box, :2]
    height = float(room.high[box, 2])
    assert not is_free(room, x, y, 0.1)
    assert not is_free(room, x, y, 0.1, above=height - 0.01)
    assert is_free(room, x, y, 0.01, above=2.0)
    assert not is_free(room, 0.1, 2.0, 0.15, above=2.0)
    assert not is_free(room, 2.0, 3.9, 0.15, above=2.0)
    assert is_free(room, 0.2, 2.0, 0.15, above=2.0)
    corner = room.low[box, :2] - 0.1 / math.sqrt(2)  # 0.1 m away, on the diagonal
    others = [i for i in range(8) if i != box]
    alone = room._replace(low=np.delete(room.low, others, 0), high=np.delete(room.high, others, 0))
    corner = np.maximum(corner, 0.16)
    distance = float(np.hypot(*np.maximum(alone.low[0, :2] - corner, 0)))
    assert is_free(alone, *corner, min(distance, 0.16) - 1e-6)
    assert not is_free(alone, *corner, distance + 1e-6)


def test_a_room_and_a_view_depend_on_seed_split_and_number_alone():
    one, again = make_room(5), make_room(5)
    for first, second in zip(one, again, strict=True):
        assert np.array_equal(first, second)
    assert not np.array_equal(make_room(5, "train").low, one.low)
    assert not np.array_equal(make_room(5, seed=1).low, one.low)
    assert not np.array_equal(make_room(6).low, one.low)
    settings = ViewSettings()
    later = draw_view(settings, "train", 9)[0]
    draw_view(settings, "train", 3)
    assert np.array_equal(draw_view(settings, "train", 9)[0].pixels, later.pixels)


def test_noise_is_of_the_pictures_alone():
    room = make_room(2)
    plain = look(room, room.start, CAMERA)
    noisy = look(room, room.start, CAMERA, noise=random_of("noise", "test", 0, 0))
    assert np.array_equal(plain.labels, noisy.labels)
    assert np.array_equal(plain.depth, noisy.depth)
    assert not np.array_equal(plain.pixels, noisy.pixels)
    assert plain.pixels.dtype == np.uint8
    assert plain.pixels.shape == (3, *SHAPE)


def test_turning_the_camera_brings_the_right_side_into_the_middle():
    room = make_room(1)
    at = room.start
    right = look(room, Pose(at.x, at.y, at.yaw - 20), CAMERA)
    view = look(room, at, CAMERA)
    column = round(CAMERA.cx + CAMERA.focal * math.tan(math.radians(20)))
    # the horizontal line of sight is the same; depth along the axis is not
    horizon = round(CAMERA.cy - CAMERA.focal * math.tan(math.radians(15)))
    wanted = view.depth[horizon, column] / math.cos(math.radians(20))
    assert right.depth[horizon, 31] == pytest.approx(wanted, rel=0.1)


@pytest.fixture(scope="module")
def views():
    return load_data("uav-rooms", options={"views": 80})


def test_splits_hold_pictures_with_a_class_for_each_pixel(views):
    assert views.classes == CLASSES
    assert views.input_shape == (3, *SHAPE)
    for split in (views.train, views.validation, views.test):
        assert split.labels.shape == (len(split), *SHAPE)
        assert split.labels.dtype == torch.int64
        assert {*split.labels.unique().tolist()} <= {OTHER, FLOOR, OBSTACLE}
    assert len(views.train) + len(views.validation) + len(views.test) == 80
    assert views.generated["version"] == 1
    shares = torch.bincount(views.train.labels.flatten(), minlength=3) / views.train.labels.numel()
    assert shares.min() > 0.05


def test_no_room_is_in_two_splits(views):
    assert len(views.validation) % 4 == 0  # whole rooms of four views
    pictures = [each.tobytes() for s in (views.train, views.test) for each in s.images.numpy()]
    assert len({*pictures}) == len(pictures)
    numbers = range(20)
    rooms = [draw_view(ViewSettings(), split, n)[2] for split in ("train", "test") for n in numbers]
    corners = [room.low.tobytes() for room in rooms]
    assert not {*corners[:20]} & {*corners[20:]}


def test_the_limit_and_the_size_are_kept():
    data = load_data("uav-rooms", options={"views": 20}, image_size=(24, 32), limit=5)
    assert len(data.train) == 5
    assert data.input_shape == (3, 24, 32)
    assert data.train.labels.shape == (5, 24, 32)
    whole = load_data("uav-rooms", options={"views": 20, "pitch": 30}, test=0.0, validation=0.0)
    assert len(whole.train) == 20
    assert whole.generated["pitch"] == 30.0


def test_labels_of_a_teacher_are_for_training_alone():
    options = {"views": 24}
    truth = load_data("uav-rooms", options=options, image_size=(24, 32))
    taught = load_data("uav-rooms", options=options | {"labels": "teacher"}, image_size=(24, 32))
    assert torch.equal(truth.train.images, taught.train.images)
    assert torch.equal(truth.test.labels, taught.test.labels)
    agreement = (truth.train.labels == taught.train.labels).float().mean()
    assert 0.6 < agreement < 1
    assert taught.fingerprint != truth.fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": 5}, "data.options.views is 10 to 1,000,000, got 5"),
        ({"labels": "mine"}, "data.options.labels is truth or teacher, got 'mine'"),
        ({"pitch": 90.0}, "data.options.pitch is 0 to 60 degrees, got 90"),
        ({"rooms": 3}, "data.options has no 'rooms'"),
        ({"views": "many"}, "data.options.views must be of type int"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        load_data("uav-rooms", options=options)


def test_settings_of_pictures_that_are_read_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"generated and does not use data\.root"):
        load_data("uav-rooms", root=tmp_path)
    with pytest.raises(UsageError, match=r"uav-rooms has no data\.channels"):
        load_data("uav-rooms", channels=1)
