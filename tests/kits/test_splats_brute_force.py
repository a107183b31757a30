"""Pictures of splats against sums over all Gaussians, scipy's harmonics, cameras and labels."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y

from smallfry.data import Split, load_data
from smallfry.errors import UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.splats.cameras import around, look_at, psnr, ring
from smallfry.kits.splats.generate import generate, generated_attributes
from smallfry.kits.splats.gsplat import gsplat_arguments
from smallfry.kits.splats.labels import Labels, make_labels
from smallfry.kits.splats.pictures import draw_views
from smallfry.kits.splats.prepare import prepare
from smallfry.kits.splats.render import (
    Camera,
    blend,
    colours,
    harmonics,
    importance,
    project,
    rasterise,
    render,
    rotation_matrices,
)
from smallfry.kits.splats.scene import RESTS, Scene
from smallfry.kits.splats.task import HIGHEST, Splats

load_kit("splats")
Y0 = 0.28209479177387814
OPTIONS = {"gaussians": 60, "pixels": 16, "views": 3}


def scene_of(degree, count=25, seed=0):
    random = np.random.default_rng(seed)
    attributes = random.normal(size=(count, 11 + RESTS[degree])) * 0.6
    attributes[:, 1:4] -= 1.5
    attributes[:, 0] *= 3  # some behind 1/255, some nearly opaque
    return Scene(random.normal(size=(count, 3)) * 0.7, attributes)


def by_sums(scene, camera, background=(0.0, 0.0, 0.0)):
    """Render by the equations: for each pixel all Gaussians by depth, without tiles."""
    p = scene.positions @ camera.rotation.T + camera.translation
    order = [i for i in np.argsort(p[:, 2], kind="stable") if p[i, 2] > 0.2]
    eye = -camera.rotation.T @ camera.translation
    own = []
    for i in order:
        row, (x, y, z) = scene.attributes[i], p[i]
        f = camera.focal
        limits = 1.3 * camera.width / (2 * f), 1.3 * camera.height / (2 * f)
        cx, cy = (z * np.clip(v / z, -most, most) for v, most in zip((x, y), limits, strict=True))
        jacobian = np.array([[f / z, 0, -f * cx / z**2], [0, f / z, -f * cy / z**2]])
        turn = Rotation.from_quat(row[[5, 6, 7, 4]]).as_matrix()
        whole = turn @ np.diag(np.exp(2 * row[1:4])) @ turn.T
        flat = jacobian @ camera.rotation @ whole @ camera.rotation.T @ jacobian.T
        inverse = np.linalg.inv(flat + 0.3 * np.eye(2))
        centre = np.array([f * x / z + camera.width / 2, f * y / z + camera.height / 2])
        d = (scene.positions[i] - eye) / np.linalg.norm(scene.positions[i] - eye)
        basis = harmonics(torch.tensor(d)[None], 15)[0].numpy()[: (len(row) - 11) // 3]
        rest = row[11:].reshape(3, -1) @ basis if len(row) > 11 else 0
        colour = np.maximum(0.5 + Y0 * row[8:11] + rest, 0)
        own.append((centre, inverse, 1 / (1 + np.exp(-row[0])), colour))
    image = np.zeros((camera.height, camera.width, 3))
    for v in range(camera.height):
        for u in range(camera.width):
            left = 1.0
            for centre, inverse, opacity, colour in own:
                d = np.array([u + 0.5, v + 0.5]) - centre
                alpha = min(0.99, opacity * np.exp(-0.5 * d @ inverse @ d))
                if alpha >= 1 / 255:
                    image[v, u] += left * alpha * colour
                    left *= 1 - alpha
            image[v, u] += left * np.array(background)
    return image


@pytest.mark.parametrize("degree", range(4))
def test_pictures_of_any_size_equal_sums_over_all_gaussians(degree):
    scene = scene_of(degree, seed=degree)
    camera = look_at((2.0, 0.6, -2.2), (0.1, 0, 0), 9.0, 9 + degree, 13 - degree)
    wanted = by_sums(scene, camera, (0.2, 0.0, 1.0))
    assert render(scene, camera, (0.2, 0.0, 1.0)) == pytest.approx(wanted, abs=1e-12)
    single = Scene(scene.positions.astype(np.float32), scene.attributes.astype(np.float32))
    found = render(single, camera, (0.2, 0.0, 1.0))
    assert found.dtype == np.float32
    assert found == pytest.approx(wanted, abs=2e-3)


def test_a_camera_among_gaussians_sees_those_before_it_alone():
    scene = scene_of(1, 40)
    camera = look_at((0.0, 0.1, 0.0), (1.0, 0.3, 0.5), 8.0, 10, 8)
    depths = (scene.positions @ camera.rotation.T + camera.translation)[:, 2]
    assert 0 < (depths <= 0.2).sum() < 40
    assert render(scene, camera) == pytest.approx(by_sums(scene, camera), abs=1e-12)
    assert (importance(scene, [camera])[depths <= 0.2] == 0).all()
    behind = scene.take(depths <= 0.2)
    assert np.abs(render(behind, camera, (0.5, 0.25, 1)) - [0.5, 0.25, 1]).max() == 0


def test_weights_and_what_is_left_sum_to_the_pixels():
    scene, cameras = scene_of(0, 60), ring(3, size=19, focal=19)
    left = 0.0
    for camera in cameras:
        found = project(torch.tensor(scene.positions), torch.tensor(scene.attributes), camera)
        tiles = list(blend(found, camera))
        seen = np.zeros((19, 19))
        for tile in tiles:
            seen[tile.rows, tile.columns] += 1
            left += tile.transmittance.sum().item()
        assert (seen == 1).all()
    total = importance(scene, cameras).sum()
    assert total + left == pytest.approx(3 * 19 * 19, rel=1e-12)
    parts = sum(importance(scene, [camera]) for camera in cameras)
    assert importance(scene, cameras) == pytest.approx(parts, rel=1e-12)


def test_a_turned_scene_before_a_turned_camera_looks_the_same():
    """Without harmonics, whose directions are the scene's."""
    scene, turn = scene_of(0), Rotation.from_euler("xyz", [0.4, -1.0, 2.2])
    attributes = scene.attributes.copy()
    own = Rotation.from_quat(attributes[:, [5, 6, 7, 4]])
    attributes[:, [5, 6, 7, 4]] = 3 * (turn * own).as_quat()  # of any length
    moved = Scene(turn.apply(scene.positions.copy()) + np.array([1.0, 2.0, 3.0]), attributes)
    camera = ring(1, size=12, focal=12)[0]
    rotation = camera.rotation @ turn.as_matrix().T
    other = Camera(rotation, camera.translation - rotation @ [1, 2, 3], 12, 12, 12)
    assert render(moved, other) == pytest.approx(render(scene, camera), abs=1e-12)


def test_harmonics_are_scipys_with_real_combinations():
    random = np.random.default_rng(0)
    d = random.normal(size=(20, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    theta, phi = np.arccos(d[:, 2]), np.arctan2(d[:, 1], d[:, 0])
    wanted = []
    for degree in (1, 2, 3):
        for m in range(-degree, degree + 1):
            value = sph_harm_y(degree, abs(m), theta, phi)
            part = value.imag if m < 0 else value.real
            wanted.append(part * (np.sqrt(2) if m else 1))
    found = harmonics(torch.tensor(d), 15).numpy()
    assert found == pytest.approx(np.stack(wanted, 1), abs=1e-13)
    for count in (3, 8):
        assert np.array_equal(harmonics(torch.tensor(d), count).numpy(), found[:, :count])


def test_colours_are_never_negative_and_rest_is_by_colour():
    rest = torch.zeros(1, 9, dtype=torch.float64)
    rest[0, 4] = 2.0  # second harmonic, z, of green
    given = torch.cat([torch.zeros(1, 3, dtype=torch.float64), rest], 1)
    for z in (3.0, -3.0):  # of any length
        red, green, blue = colours(torch.tensor([[0.0, 0.0, z]]).double(), given)[0].tolist()
        assert (red, blue) == (0.5, 0.5)
        assert green == pytest.approx(max(0.0, 0.5 + np.sign(z) * 2 * np.sqrt(3 / 4 / np.pi)))
    dark = torch.full((1, 3), -9.0)
    assert colours(torch.ones(1, 3), dark).tolist() == [[0, 0, 0]]


def test_quaternions_of_any_length_are_scipys_rotations():
    q = np.random.default_rng(0).normal(size=(30, 4)) * 7
    wanted = Rotation.from_quat(q[:, [1, 2, 3, 0]]).as_matrix()
    assert rotation_matrices(torch.tensor(q)).numpy() == pytest.approx(wanted, abs=1e-14)
    assert rotation_matrices(torch.tensor(-q)).numpy() == pytest.approx(wanted, abs=1e-14)
    assert torch.equal(rotation_matrices(torch.zeros(1, 4)), torch.eye(3)[None])


def test_no_gaussians_give_the_background_and_gradients_of_none():
    empty = Scene(np.zeros((0, 3)), np.zeros((0, 56)))
    camera = ring(1, size=5)[0]
    assert (render(empty, camera, (0.1, 0.2, 0.3)) == [0.1, 0.2, 0.3]).all()
    assert importance(empty, [camera]).shape == (0,)
    scene = scene_of(2, 5)
    positions, attributes = (
        torch.tensor(each).requires_grad_() for each in (scene.positions, scene.attributes)
    )
    rasterise(positions, attributes, camera).sum().backward()
    depths = (scene.positions @ camera.rotation.T + camera.translation)[:, 2]
    assert (depths > 0.2).all()
    assert positions.grad.isfinite().all()
    assert attributes.grad.isfinite().all()


# Cameras


def test_targets_are_in_the_middle_and_nearer_ones_appear_larger():
    camera = look_at((1.0, 2.0, 3.0), (-1.0, 0.5, 2.0), 50.0, 40, 30)
    for share in (0.3, 1.0, 2.0):
        point = np.array([1.0, 2, 3]) + share * np.array([-2.0, -1.5, -1])
        x, y, z = camera.rotation @ point + camera.translation
        assert (x, y) == pytest.approx((0, 0), abs=1e-12)
        assert z == pytest.approx(share * np.sqrt(4 + 2.25 + 1))
    with pytest.raises(UsageError, match="can't be at its target"):
        look_at((1, 1, 1), (1, 1, 1), 1, 2, 2)


def test_rings_have_their_radius_and_halves_between_them():
    whole = ring(8, (1, 2, 3), 5.0)
    eyes = np.array([-c.rotation.T @ c.translation for c in whole])
    assert np.linalg.norm(eyes - [1, 2, 3], axis=1) == pytest.approx(np.full(8, 5.0))
    between = ring(4, (1, 2, 3), 5.0, start=0.5)
    doubled = [-c.rotation.T @ c.translation for c in between]
    assert np.array(doubled) == pytest.approx(eyes[1::2])  # ½ of 4 is every second of 8
    assert [(c.width, c.height, c.focal) for c in ring(1, size=9, focal=7)] == [(9, 9, 7)]


def test_a_scene_fills_the_view_whatever_its_size_and_place():
    places = np.random.default_rng(0).normal(size=(400, 3))
    ends = []
    for scale, shift in ((1.0, 0.0), (500.0, 1e4)):
        positions = scale * places + shift
        for camera in around(positions, 3, 32):
            x, y, z = (positions @ camera.rotation.T + camera.translation).T
            u, v = camera.focal * x / z, camera.focal * y / z
            ends.append(np.maximum(np.abs(u), np.abs(v)))
            assert z.min() > 0
    assert np.array(ends[:3]) == pytest.approx(np.array(ends[3:]), rel=1e-6, abs=1e-6)
    assert 0.9 < np.mean(np.array(ends) < 16) < 1.0
    assert len(around(np.zeros((1, 3)), 2)) == 2  # a single place


def test_ratios_of_pictures_in_decibels():
    zeros = np.zeros((4, 4))
    assert psnr(zeros + 0.1, zeros) == pytest.approx(20)
    assert psnr(zeros + 5, zeros + 1) == float("inf")  # both are clipped to 1
    assert psnr(zeros - 3, zeros) == float("inf")
    assert psnr(zeros.astype(np.float16) + 1, zeros) == 0


# Generated scenes and labels


def test_more_gaussians_are_smaller_and_seeds_are_checked():
    normals = np.tile([0.0, 0.0, -1.0], (5, 1))
    x = np.random.default_rng(0).normal(size=(5, 3))
    one, half = (generated_attributes(x, normals, scale) for scale in (1.0, 0.5))
    assert one[:, 1:4] - half[:, 1:4] == pytest.approx(np.full((5, 3), np.log(2)))
    assert np.array_equal(np.delete(one, [1, 2, 3], 1), np.delete(half, [1, 2, 3], 1))
    turns = rotation_matrices(torch.tensor(generated_attributes(x, x)[:, 4:8]))
    directions = x / np.linalg.norm(x, axis=1, keepdims=True)
    across = generated_attributes(x, directions)[:, 4:8]
    axes = rotation_matrices(torch.tensor(across))[:, :, 2].numpy()
    assert np.abs((axes * directions).sum(1)) == pytest.approx(np.ones(5))
    assert turns.shape == (5, 3, 3)


def test_parts_of_labels_are_what_went_in():
    scene = generate("gyroid", 30)
    found = prepare(scene, ring(2, size=16, focal=16), 0.3)
    codes = found.grid.codes(found.integers)
    known = Labels(make_labels(found.scene, codes, found.importance, found.kept, 0.25))
    assert np.array_equal(known.codes.numpy(), codes)
    assert np.array_equal(known.attributes.numpy(), found.scene.attributes)
    assert known.kept.tolist() == found.kept.tolist()
    assert known.view == 0.25
    ratio = known.importance[known.kept].numpy() * found.importance[found.kept].mean()
    assert ratio == pytest.approx(found.importance[found.kept], rel=1e-5)
    wanted = found.scene.attributes[found.kept].astype(np.float64).std(0)
    assert known.deviations[7].numpy() == pytest.approx(wanted.clip(1e-4), rel=1e-5)
    nothing = make_labels(found.scene, codes, 0 * found.importance, found.kept, 0.0)
    assert Labels(nothing).importance.tolist() == found.kept.tolist()
    assert Labels(nothing[:0]).view == 0.0
    for wrong in (nothing[:, :-1], nothing.long(), nothing[0], nothing[:, :30]):
        with pytest.raises(UsageError, match="needs a scene to learn"):
            Labels(wrong)


def test_losses_are_errors_in_deviations_times_importance():
    labels = load_data("splats-torus", options=OPTIONS).test.labels
    known, task = Labels(labels), Splats()
    outputs = known.attributes.clone()
    outputs[:, 5] += 3 * known.deviations[:, 5]
    wanted = 9 / 56 * known.importance
    assert task.losses(outputs, labels).tolist() == pytest.approx(wanted.tolist(), rel=1e-3)
    assert not task.right(outputs, labels).any()  # 0.16 variances
    outputs[:, 5] -= 1.5 * known.deviations[:, 5]
    assert torch.equal(task.right(outputs, labels), known.kept)
    pruned = labels.clone()
    pruned[:, -2] = 0
    assert task.metrics(outputs, pruned) == dict.fromkeys(
        ("loss", "accuracy", "psnr", "worst_psnr"), 0.0
    )
    whole = load_data("splats-torus", options={**OPTIONS, "prune": 0.0}).validation.labels
    scores = task.metrics(Labels(whole).attributes, whole)
    assert scores["worst_psnr"] <= scores["psnr"] <= HIGHEST


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"position_bits": 7}, "position_bits is 8 to 16, got 7"),
        ({"views": 0}, "views is 1 to 1000, got 0"),
        ({"pixels": 4096}, "pixels is 8 to 2048"),
        ({"prune": float("nan")}, "prune is 0 to below 1, got nan"),
        ({"gaussian": 9}, "did you mean 'gaussians'"),
    ],
)
def test_options_of_scenes_out_of_range_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        load_data("splats-hills", options=options)


def test_the_arguments_for_a_gpu_have_harmonics_by_number_then_colour():
    for degree in range(4):
        scene = scene_of(degree, 3)
        given = gsplat_arguments(scene, ring(1, size=8)[0], (1.0, 0.5, 0.0))
        assert given["colors"].shape == (3, 1 + RESTS[degree] // 3, 3)
        for k in range(RESTS[degree] // 3):
            for colour in range(3):
                column = 11 + colour * (RESTS[degree] // 3) + k
                wanted = scene.attributes[:, column].astype(np.float32)
                assert np.array_equal(given["colors"][:, 1 + k, colour].numpy(), wanted)
        assert given["Ks"].tolist() == [[[64, 0, 4], [0, 64, 4], [0, 0, 1]]]
        assert given["backgrounds"].tolist() == [[1, 0.5, 0]]


# Pictures


def shares(file):
    """Share of pixels of a strong red, green, and black."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    red = (pixels == [255, 0, 0]).all(-1)
    green = (pixels == [0, 255, 0]).all(-1)
    black = (pixels == 0).all(-1)
    return [each.mean() for each in (red, green, black)]


def test_views_show_the_original_the_decoded_and_five_times_their_difference(tmp_path):
    red, green = np.zeros((8, 8, 3)), np.zeros((8, 8, 3))
    red[..., 0], green[..., 1] = 1.0, 1.0
    draw_views([(green, red)], tmp_path / "a.png")
    first, second, _ = shares(tmp_path / "a.png")
    assert first == pytest.approx(second, rel=0.02)
    assert first > 0.1
    draw_views([(red, red)], tmp_path / "b.png")
    both, none, black = shares(tmp_path / "b.png")
    assert both == pytest.approx(2 * first, rel=0.02)
    assert none == 0
    assert black > 0.9 * first  # no difference
    weak = red.copy()
    weak[..., 1] += 0.2  # 5 · 0.2 is all of it
    draw_views([(weak, red)] * 9, tmp_path / "c.png")
    third, fourth, _ = shares(tmp_path / "c.png")
    assert third == pytest.approx(fourth, rel=0.02)
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in "ac"]
    assert sizes[1][1] > 3.5 * sizes[0][1]  # four views of nine


def test_a_run_of_nothing_kept_draws_nothing(tmp_path):
    data = load_data("splats-torus", options=OPTIONS)
    labels = data.test.labels.clone()
    labels[:, -2] = 0
    split = Split(data.test.images, data.test.rows, labels)
    outputs = Labels(labels).attributes
    Splats().draw(outputs, split, data.classes, tmp_path)
    assert not [*tmp_path.iterdir()]
    Splats().draw(outputs, data.test, data.classes, tmp_path)
    assert Image.open(tmp_path / "views.png").size[0] > 300
