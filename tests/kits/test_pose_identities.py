"""Identities of codes, errors, renders and losses of poses, in float64 and by loops."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from smallfry.errors import DataError
from smallfry.kits.pose.losses import code_loss, mask_loss, place_loss
from smallfry.kits.pose.mesh import (
    farthest_points,
    generated_mesh,
    keypoints,
    nearest_neighbours,
    normalised,
)
from smallfry.kits.pose.metrics import add, adi, area_under, diameter, rotation_error
from smallfry.kits.pose.models import mean_places, waves_of
from smallfry.kits.pose.render import crop_camera, rasterise, shade
from smallfry.kits.pose.scenes import CAMERA, SceneSettings, draw_scene, rotation_of
from smallfry.kits.pose.truth import codes, pack, unpack
from smallfry_runtime.decoders.pose import cells_of, decode, estimate, places
from smallfry_runtime.errors import UsageError
from smallfry_runtime.pnp import Camera, Pose, project, solve


def turn(seed):
    quaternion = np.random.default_rng(seed).normal(size=4)
    return rotation_of(quaternion / np.linalg.norm(quaternion))


def pose_of(seed):
    random = np.random.default_rng(seed + 100)
    return Pose(turn(seed), np.array([*random.uniform(-0.1, 0.1, 2), random.uniform(0.5, 1.0)]))


@pytest.fixture(scope="module")
def mesh():
    return generated_mesh(1)


POINTS = np.random.default_rng(0).uniform(-0.05, 0.05, (40, 3))


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_points_are_chosen_one_after_the_other_by_the_largest_distance(count):
    chosen = farthest_points(POINTS, count).tolist()
    assert len({*chosen}) == count
    known = [(POINTS.min(axis=0) + POINTS.max(axis=0)) / 2]
    for number in chosen:
        away = np.array([min(np.linalg.norm(p - k) for k in known) for p in POINTS])
        assert away[number] == pytest.approx(away.max())
        known.append(POINTS[number])
    with pytest.raises(DataError, match="41 keypoints were asked for, and the surface has 40"):
        farthest_points(POINTS, 41)


def test_of_points_equally_far_the_first_is_chosen():
    square = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], float)
    assert farthest_points(square, 4).tolist() == [0, 1, 2, 3]


def test_neighbours_are_the_nearest_and_first_the_point_itself():
    found = nearest_neighbours(POINTS, 5)
    assert found[:, 0].tolist() == [*range(40)]
    for row, point in zip(found, POINTS, strict=True):
        away = np.linalg.norm(POINTS - point, axis=1)
        assert away[row] == pytest.approx(np.sort(away)[:5])
    moved = normalised(3 * POINTS + 7)
    assert moved.mean(axis=0) == pytest.approx(np.zeros(3), abs=1e-12)
    assert np.linalg.norm(moved, axis=1).max() == pytest.approx(1)
    assert moved == pytest.approx(normalised(POINTS))


def test_keypoints_lie_on_the_surface(mesh):
    chosen = keypoints(mesh, 30)
    away = np.linalg.norm(mesh.surface[:, None] - chosen, axis=-1).min(axis=0)
    assert away.max() < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_errors_of_poses_are_distances_that_no_common_motion_changes(seed):
    truth, found = pose_of(seed), pose_of(seed + 50)
    assert adi(POINTS, truth, found) <= add(POINTS, truth, found)
    assert add(POINTS, truth, truth) == adi(POINTS, truth, truth) == 0
    assert add(POINTS, truth, found) == pytest.approx(add(POINTS, found, truth))
    world = pose_of(seed + 9)
    both = [
        Pose(world.rotation @ p.rotation, world.rotation @ p.translation + world.translation)
        for p in (truth, found)
    ]
    assert add(POINTS, *both) == pytest.approx(add(POINTS, truth, found))
    assert adi(POINTS, *both) == pytest.approx(adi(POINTS, truth, found))
    shifted = Pose(truth.rotation, truth.translation + np.array([0, 0.03, 0.04]))
    assert add(POINTS, truth, shifted) == pytest.approx(0.05)


def test_half_a_turn_of_a_symmetric_object_is_no_error_by_the_nearest_points():
    both = np.vstack([POINTS, POINTS * [-1, -1, 1]])
    half = Pose(np.diag([-1.0, -1.0, 1.0]), np.array([0, 0, 0.5]))
    straight = Pose(np.eye(3), np.array([0, 0, 0.5]))
    assert adi(both, straight, half) == pytest.approx(0, abs=1e-12)
    assert add(both, straight, half) > 0.02


@pytest.mark.parametrize("angle", [0.0, 1e-3, 30.0, 90.0, 179.0, 180.0])
def test_the_error_of_a_rotation_is_its_angle(angle):
    a = np.radians(angle)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    base = turn(3)
    assert rotation_error(base, about_x @ base) == pytest.approx(angle, abs=1e-4)
    assert rotation_error(about_x @ base, base) == pytest.approx(angle, abs=1e-4)


def test_the_diameter_and_the_area_are_those_of_loops():
    pairs = [np.linalg.norm(a - b) for a in POINTS for b in POINTS]
    assert diameter(POINTS) == pytest.approx(max(pairs))
    assert diameter(POINTS @ turn(1).T + 3) == pytest.approx(max(pairs))
    errors = np.array([0.0, 0.05, 0.1, 7.0])
    steps = (np.arange(100_000) + 0.5) / 1e6  # to 10 cm
    shares = [(errors < step).mean() for step in steps[::100]]
    assert area_under(errors, 0.1) == pytest.approx(np.mean(shares), abs=1e-3)
    assert area_under(errors[:0], 0.1) == 0.0


CROP = (100, 60, 96)


def truth_of(pixels, crop=CROP):
    cells = np.zeros((2, 4, 4), bool)
    row = pack(pose_of(0), CAMERA, crop, False, np.asarray(pixels, float), cells)
    return unpack(torch.from_numpy(row)[None])


@pytest.mark.parametrize("bits", [1, 3, 5, 6])
def test_a_cell_has_its_first_pixel_and_not_its_last(bits):
    q = 96 / 2**bits
    pixels = [(100, 60), (100 + q, 60 + q), (100 + q - 0.01, 60), (195.99, 155.99)]
    outside = [(99.99, 60), (196, 60), (100, 156), (100, 59.9), (-500, 900)]
    found = codes(truth_of(pixels + outside), bits)
    assert found.inside[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    cells = [cells_of(bits_of[0].numpy()).tolist() for bits_of in (found.x, found.y)]
    top = 2**bits - 1
    assert cells[0] == [0, 1, 0, top, 0, top, 0, 0, 0]  # those outside: of the nearest cell
    assert cells[1] == [0, 1, 0, top, 0, 0, top, 0, top]


@pytest.mark.parametrize("bits", [1, 4, 6])
def test_codes_are_read_back_within_half_a_cell(bits):
    random = np.random.default_rng(bits)
    pixels = np.array(CROP[:2]) + 96 * random.random((50, 2))
    found = codes(truth_of(pixels), bits)
    logits = {"x": 8 * found.x.numpy() - 4, "y": 8 * found.y.numpy() - 4}
    read = places(logits, np.array([CROP], float))
    assert np.abs(read[0] - pixels).max() <= 48 / 2**bits + 1e-4
    other = places(logits, np.array([[10.0, 20.0, 192.0]]))
    assert other[0] == pytest.approx((read[0] - CROP[:2]) * 2 + [10, 20])


def test_truth_is_unpacked_as_it_was_packed():
    masks = np.random.default_rng(0).random((2, 2, 8, 8)) < 0.5
    pixels = np.random.default_rng(1).uniform(0, 640, (2, 5, 2))
    rows = [
        pack(pose_of(i), CAMERA, (i, -3, 50 + i), bool(i), pixels[i], masks[i]) for i in range(2)
    ]
    truth = unpack(torch.from_numpy(np.stack(rows)))
    assert truth.masks.numpy().astype(bool).tolist() == masks.tolist()
    assert truth.symmetric.tolist() == [0, 1]
    assert truth.crop.tolist() == [[0, -3, 50], [1, -3, 51]]
    assert truth.pixels.numpy() == pytest.approx(pixels, rel=1e-6)
    assert truth.pose(1).rotation == pytest.approx(pose_of(1).rotation, abs=1e-7)
    for wrong in (rows[0][:-1], rows[0][:21], rows[0][:0]):
        with pytest.raises(DataError, match="the task pose needs pictures with poses"):
            unpack(torch.from_numpy(wrong)[None])


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_of_codes_are_those_of_a_loop():
    logits, bits = noise(0, 3, 4, 6), (noise(1, 3, 4, 6) > 0).double()
    inside = (noise(2, 3, 6) > 0).double()
    inside[2] = 0
    found = code_loss(logits, bits, inside)
    for b in range(3):
        each = []
        for k, n in np.ndindex(4, 6):
            share = torch.sigmoid(logits[b, k, n])
            if inside[b, n]:
                each.append(-(share if bits[b, k, n] else 1 - share).log().item())
        assert found[b].item() == pytest.approx(np.mean(each) if each else 0.0)


def test_losses_of_masks_and_places_are_mean_distances():
    logits, mask = noise(0, 2, 4, 4), (noise(1, 2, 8, 8) > 0).double()
    wanted = (logits.sigmoid() - mask[:, ::2, ::2]).abs().mean(dim=(1, 2))
    assert_close(mask_loss(logits, mask), wanted)
    truth = truth_of([(100, 60), (148, 84), (10_000, -10_000)])
    spots = torch.tensor([[[0.25, 0.5, 1.2], [0.0, 0.0, -0.2]]])  # far ones are drawn beside it
    assert place_loss(spots, truth).tolist() == pytest.approx([(0.25 + 0.25) / 6], abs=1e-6)


def test_mean_places_of_flat_and_hot_maps():
    heat = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    heat[0, 1, 3, 0] = 200
    found = mean_places(heat)
    assert_close(found[0, :, 0], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert_close(found[0, :, 1], torch.tensor([0.125, 0.875], dtype=torch.float64))
    waves = waves_of(found, 3)
    assert waves.shape == (1, 12, 2)
    pairs = waves.view(3, 2, 2, 2).square().sum(dim=1)  # of sine and cosine
    assert_close(pairs, torch.ones_like(pairs))


@pytest.mark.parametrize("seed", range(3))
def test_a_crop_of_equal_size_is_cut_out_of_the_whole_render(mesh, seed):
    camera = Camera(150.0, 140.0, 31.2, 33.9)
    pose = Pose(turn(seed), np.array([0.01, -0.02, 0.4]))
    whole = rasterise(mesh, pose, camera, 64, 64)
    part = rasterise(mesh, pose, crop_camera(camera, (8, 5, 40), 40), 40, 40)
    assert np.array_equal(part.triangle, whole.triangle[5:45, 8:48])
    assert np.allclose(part.depth, whole.depth[5:45, 8:48], rtol=1e-12)
    assert (part.triangle >= 0).any()
    large = crop_camera(camera, (8, 5, 40), 80)  # a pixel's middle stays where it is
    corner = project(mesh.vertices, pose, camera)
    assert (project(mesh.vertices, pose, large) + 0.5) / 2 == pytest.approx(corner - [8, 5] + 0.5)


def test_the_order_of_triangles_changes_no_depth(mesh):
    camera, pose = Camera(100.0, 100.0, 20.0, 20.0), Pose(turn(4), np.array([0, 0, 0.4]))
    first = rasterise(mesh, pose, camera, 40, 40)
    order = np.random.default_rng(0).permutation(len(mesh.triangles))
    shuffled = type(mesh)(mesh.vertices, mesh.triangles[order], mesh.colours[order], mesh.surface)
    other = rasterise(shuffled, pose, camera, 40, 40)
    assert np.allclose(first.depth, other.depth)
    assert np.isinf(first.depth).tolist() == (first.triangle < 0).tolist()


def test_light_from_everywhere_shows_the_colours_of_faces(mesh):
    plain = type(mesh)(mesh.vertices, mesh.triangles, mesh.colours, mesh.surface)
    camera, pose = Camera(100.0, 100.0, 20.0, 20.0), Pose(turn(5), np.array([0, 0, 0.4]))
    render = rasterise(plain, pose, camera, 40, 40)
    towards = np.array([0, 0, -1.0])
    colours = shade(plain, pose, camera, render, towards, ambient=1.0)
    assert colours == pytest.approx(plain.colours[render.triangle[render.triangle >= 0]])
    lit = shade(plain, pose, camera, render, towards, ambient=0.0)
    assert (lit <= colours + 1e-12).all()
    assert (lit > 0).all()  # what is seen from the light is lit


@pytest.mark.parametrize("number", range(3))
def test_a_generated_picture_has_the_mask_of_its_stated_pose(mesh, number):
    scene = draw_scene(SceneSettings(hidden=1.0), mesh, "test", number, 48)
    camera = crop_camera(scene.camera, scene.crop, 48)
    render = rasterise(mesh, scene.pose, camera, 48, 48)
    assert np.array_equal(render.triangle >= 0, scene.whole)
    assert not (scene.seen & ~scene.whole).any()
    assert scene.seen.sum() >= 0.6 * scene.whole.sum()
    assert 0.5 <= scene.pose.translation[2] <= 1.0
    assert np.linalg.det(scene.pose.rotation) == pytest.approx(1)


def outputs_of(pose, points, bits=6, crop=CROP):
    truth = truth_of(project(points, pose, CAMERA), crop)
    found = codes(truth, bits)
    return {
        "in_roi": 2 * found.inside.numpy()[:, None] - 1,
        "x": 2 * found.x.numpy() - 1,
        "y": 2 * found.y.numpy() - 1,
        "points": points[None],
    }


AHEAD = Pose(turn(7), np.array([-0.17, -0.12, 0.6]))
SETTINGS = {"camera": [*CAMERA], "crop": [*CROP]}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_poses_do_not_depend_on_the_type_or_scale_of_logits(kind):
    points = np.random.default_rng(0).uniform(-0.05, 0.05, (60, 3))
    outputs = outputs_of(AHEAD, points)
    assert (outputs["in_roi"] > 0).mean() > 0.5
    (wanted,) = decode(outputs, ("box",), SETTINGS)
    scaled = {name: (3 * each).astype(kind) for name, each in outputs.items() if name != "points"}
    (found,) = decode({**scaled, "points": points[None]}, ("box",), SETTINGS)
    assert found == wanted
    assert found["object"] == "box"
    estimated = Pose(*(np.array(found["pose"][name]) for name in ("rotation", "translation")))
    assert add(points, AHEAD, estimated) < 0.01
    assert np.allclose(estimated.rotation @ estimated.rotation.T, np.eye(3))
    seen = [place is not None for place in found["keypoints"]]
    assert seen == (outputs["in_roi"][0, 0] > 0).tolist()


def test_each_input_has_its_own_crop():
    points = np.random.default_rng(0).uniform(-0.05, 0.05, (60, 3))
    other = (90, 50, 120)
    one, two = outputs_of(AHEAD, points), outputs_of(AHEAD, points, crop=other)
    both = {name: np.concatenate([one[name], two[name]]) for name in one}
    found = decode(both, ("box",), {**SETTINGS, "crop": [[*CROP], [*other]]})
    assert found[0] == decode(one, ("box",), SETTINGS)[0]
    assert found[1] == decode(two, ("box",), {**SETTINGS, "crop": [*other]})[0]


def test_keypoints_outside_or_too_few_have_no_pose():
    outputs = outputs_of(AHEAD, POINTS)
    outputs["in_roi"] = -np.abs(outputs["in_roi"])
    (found,) = decode(outputs, ("box",), SETTINGS)
    assert (found["pose"], found["inliers"]) == (None, 0)
    assert found["keypoints"] == [None] * 40
    outputs["in_roi"][0, 0, :5] = 1
    assert decode(outputs, ("box",), SETTINGS)[0]["pose"] is None
    assert solve(POINTS[:5], project(POINTS[:5], AHEAD, CAMERA), CAMERA, 2.0) is None
    nothing = {name: each[:0] for name, each in outputs.items()}
    assert decode(nothing, ("box",), SETTINGS) == []


@pytest.mark.parametrize("seed", [-1, 1.5, "one", None, True, 2**31])
def test_seeds_of_decoding_are_whole_numbers_from_0(seed):
    with pytest.raises(UsageError, match="seed is a whole number from 0 to"):
        decode(outputs_of(AHEAD, POINTS), ("box",), {**SETTINGS, "seed": seed})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"camera": [1, 1, 0, float("nan")]}, "set camera to"),
        ({"camera": [1, 1, 0, "0"]}, "set camera to"),
        ({"camera": "wide"}, "set camera to"),
        ({"camera": 5}, "set camera to"),
        ({"crop": [0, 0, -9]}, "set crop to"),
        ({"crop": [0, 0]}, "set crop to"),
        ({"crop": [[0, 0, 9], 5]}, "set crop to"),
        ({"crop": "all"}, "set crop to"),
        ({"crop": 7}, "set crop to"),
        ({"solver": "best"}, "solver is own or opencv, got 'best'"),
    ],
)
def test_settings_of_another_form_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        decode(outputs_of(AHEAD, POINTS), ("box",), {**SETTINGS, **settings})


@pytest.mark.parametrize("seed", range(3))
def test_a_third_of_wrong_places_changes_no_pose(seed):
    random = np.random.default_rng(seed)
    points = random.uniform(-0.05, 0.05, (60, 3))
    pixels = project(points, AHEAD, CAMERA)
    wrong = random.permutation(60)[:20]
    pixels[wrong] += random.uniform(30, 90, (20, 2))
    found = estimate(points, pixels, CAMERA, 0.5, seed=seed)
    assert found.inliers == 40
    assert add(points, AHEAD, found.pose) < 1e-6
    again = estimate(points, pixels, CAMERA, 0.5, seed=seed)
    assert np.array_equal(again.pose.rotation, found.pose.rotation)
