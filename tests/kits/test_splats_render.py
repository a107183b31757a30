"""Rasteriser of splats: golden image, identities, gradients, peers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.splats_numpy import render_file
from smallfry.errors import UsageError
from smallfry.kits.splats.cameras import around, look_at, psnr, ring
from smallfry.kits.splats.generate import BODIES, generate, gradient, surface
from smallfry.kits.splats.gsplat import gsplat_arguments, render_with_gsplat
from smallfry.kits.splats.render import (
    Camera,
    harmonics,
    importance,
    project,
    rasterise,
    render,
    rotation_matrices,
)
from smallfry.kits.splats.scene import Scene, write_scene

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from zoo_golden import images, series

GOLDEN = json.loads((Path(__file__).parent / "golden" / "splats.json").read_text())
CAMERA = Camera(np.eye(3), np.array([0, 0, 3.0]), 24, 24, 16)


def golden_scene() -> Scene:
    columns = [
        2 * series("opacity", 12).reshape(12, 1),
        0.5 * series("scale", 36).reshape(12, 3) - 1.8,
        images((12, 4), "rot"),
        images((12, 3), "sh0"),
    ]
    return Scene((0.3 * images((12, 3), "pos")).numpy(), torch.cat(columns, 1).numpy())


def test_the_image_and_the_importance_are_the_golden_ones():
    scene, wanted = golden_scene(), GOLDEN["image"]
    image = render(scene, CAMERA)
    assert list(image.shape) == wanted["shape"]
    assert image.sum() == pytest.approx(wanted["sum"], rel=1e-12)
    assert np.abs(image).mean() == pytest.approx(wanted["absmean"], rel=1e-12)
    assert np.linalg.norm(image) == pytest.approx(wanted["l2"], rel=1e-12)
    assert image.ravel()[:10].tolist() == pytest.approx(wanted["head"], abs=1e-12)
    assert image[8, 12].tolist() == pytest.approx(GOLDEN["centre_pixel"], rel=1e-12)
    assert importance(scene, [CAMERA]) == pytest.approx(GOLDEN["importance"], rel=1e-12)
    white = render(scene, CAMERA, (1, 1, 1)).sum()
    assert white == pytest.approx(GOLDEN["image_white_background_sum"], rel=1e-12)


def test_a_white_scene_on_white_is_white():
    scene = golden_scene()
    attributes = scene.attributes.copy()
    attributes[:, 8:11] = 0.5 / 0.28209479177387814
    found = render(Scene(scene.positions, attributes), CAMERA, (1, 1, 1))
    assert np.abs(found - 1).max() < 1e-14


def test_one_round_gaussian_falls_off_as_its_variance_says():
    attributes = np.zeros((1, 11))
    attributes[0, 1:4], attributes[0, 4] = -1.5, 1
    attributes[0, 8:] = 0.5 / 0.28209479177387814
    camera = Camera(np.eye(3), np.array([0, 0, 3.0]), 24, 17, 17)
    found = render(Scene(np.zeros((1, 3)), attributes), camera)[8, :, 0]
    variance = (24 * np.exp(-1.5) / 3) ** 2 + 0.3
    assert found[8] == pytest.approx(0.5, abs=1e-15)
    assert found[12] == pytest.approx(0.5 * np.exp(-8 / variance), rel=1e-13)


def test_the_order_of_gaussians_does_not_matter():
    scene = generate("gyroid", 200)
    order = np.random.default_rng(0).permutation(200)
    camera = ring(3, size=32, focal=32)[1]
    assert np.abs(render(scene, camera) - render(scene.take(order), camera)).max() < 1e-6


def test_gradients_are_those_of_finite_differences():
    scene, random = golden_scene(), np.random.default_rng(1)
    weights = torch.tensor(random.normal(size=(16, 24, 3)))
    values = [torch.tensor(each).requires_grad_() for each in (scene.positions, scene.attributes)]

    def total(positions, attributes):
        return (rasterise(positions, attributes, CAMERA) * weights).sum()

    found = torch.autograd.grad(total(*values), values)
    for tensor, own in zip(values, found, strict=True):
        direction = torch.tensor(random.normal(size=tuple(tensor.shape)))
        for scale in (1e-7,):  # small: α has a step at 1/255, which a long way may cross
            moved = [
                total(*(v + s * scale * direction if v is tensor else v for v in values)).item()
                for s in (1, -1)
            ]
            numeric = (moved[0] - moved[1]) / (2 * scale)
            assert numeric == pytest.approx((own * direction).sum().item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("body", BODIES)
def test_a_second_renderer_reads_the_file_and_agrees(body, tmp_path):
    scene = generate(body, 150, seed=3)
    write_scene(scene, tmp_path / "scene.ply")
    for camera in ring(2, size=24, focal=24, start=0.3):
        found = render_file(tmp_path / "scene.ply", camera)
        assert np.abs(found - render(scene, camera)).max() < 2e-5


def test_projection_and_harmonics_are_those_of_gsplat():
    peer = pytest.importorskip("gsplat.cuda._torch_impl")
    scene = generate("torus", 60)
    camera = ring(1, size=32, focal=32)[0]
    given = gsplat_arguments(scene, camera)
    covariances, _ = peer._quat_scale_to_covar_preci(given["quats"], given["scales"])
    _, centres, depths, conics, _ = peer._fully_fused_projection(
        given["means"], covariances, given["viewmats"], given["Ks"], 32, 32, 0.3, 0.2
    )
    found = project(torch.tensor(scene.positions), torch.tensor(scene.attributes), camera)
    assert torch.equal(found.rows, depths[0].argsort(stable=True))
    assert (centres[0][found.rows] - found.centres).abs().max() < 1e-4
    assert (conics[0][found.rows] - found.conics).abs().max() < 1e-4
    eye = torch.tensor(-camera.rotation.T @ camera.translation, dtype=torch.float32)
    directions = torch.tensor(scene.positions) - eye
    wanted = peer._spherical_harmonics(3, directions, given["colors"])[found.rows] + 0.5
    assert (wanted.clamp(min=0) - found.colours).abs().max() < 1e-5


def test_the_arguments_of_gsplat_are_those_it_has():
    import inspect

    gsplat = pytest.importorskip("gsplat")
    given = gsplat_arguments(generate("torus", 10), ring(1)[0])
    inspect.signature(gsplat.rasterization).bind(**given)
    assert given["colors"].shape == (10, 16, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gsplat_without_a_gpu_is_refused():
    with pytest.raises(UsageError, match="CUDA"):
        render_with_gsplat(golden_scene(), CAMERA)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gsplat_renders_the_same():
    pytest.importorskip("gsplat")
    scene, camera = generate("torus", 2000), ring(1)[0]
    assert np.abs(render_with_gsplat(scene, camera) - render(scene, camera)).max() < 5e-3


def test_harmonics_are_orthonormal():
    z, weights = np.polynomial.legendre.leggauss(8)
    angles = 2 * np.pi * np.arange(16) / 16
    grid = [
        (np.sqrt(1 - c * c) * np.cos(a), np.sqrt(1 - c * c) * np.sin(a), c)
        for c in z
        for a in angles
    ]
    found = harmonics(torch.tensor(grid, dtype=torch.float64), 15)
    measure = torch.tensor(np.repeat(weights, 16) * 2 * np.pi / 16)
    assert (found.T @ (found * measure[:, None]) - torch.eye(15)).abs().max() < 1e-12


def test_rotations_are_rotations():
    found = rotation_matrices(images((5, 4), "rot"))
    assert (found @ found.mT - torch.eye(3)).abs().max() < 1e-14
    assert torch.linalg.det(found) == pytest.approx(np.ones(5), abs=1e-14)


@pytest.mark.parametrize("body", BODIES)
def test_generated_points_are_on_the_surface(body):
    points, normals = surface(BODIES[body], 300, np.random.default_rng(0))
    assert np.abs(BODIES[body](points)).max() < 1e-3
    slopes = gradient(BODIES[body], points)
    lengths = np.linalg.norm(slopes, axis=1)
    assert ((slopes * normals).sum(1) / lengths) == pytest.approx(np.ones(300))
    again = generate(body, 300)
    assert np.array_equal(again.attributes, generate(body, 300).attributes)
    assert not np.array_equal(again.positions, generate(body, 300, 1).positions)


def test_cameras_look_at_their_target():
    for camera in [*ring(5, (1, 2, 3)), *around(np.random.default_rng(0).normal(size=(50, 3)), 4)]:
        assert camera.rotation @ camera.rotation.T == pytest.approx(np.eye(3), abs=1e-12)
        assert np.linalg.det(camera.rotation) == pytest.approx(1)
    centre = ring(1, (1, 2, 3))[0]
    assert centre.rotation @ [1, 2, 3] + centre.translation == pytest.approx([0, 0, 3.2])
    above = centre.rotation @ [1, 2.5, 3] + centre.translation
    assert above[1] < 0  # y of an image points down
    with pytest.raises(UsageError, match="above or below"):
        look_at((0, 1, 0), (0, 0, 0), 1, 2, 2)


def test_wrong_bodies_and_counts_are_refused():
    with pytest.raises(UsageError, match="unknown body 'tors'"):
        generate("tors")
    with pytest.raises(UsageError, match="1 to 1,000,000"):
        generate("torus", 0)
    assert psnr([0.5], [0.5]) == float("inf")


@pytest.mark.parametrize("factor", [1e-3, 0.03, 1.0, 300.0])
def test_a_scene_in_another_unit_gives_the_same_pictures(factor):
    scene = generate("torus", 80)
    attributes = scene.attributes.astype(np.float64)
    moved = attributes.copy()
    moved[:, 1:4] += np.log(factor)
    one = Scene(scene.positions.astype(np.float64), attributes)
    other = Scene(factor * one.positions, moved)
    pairs = zip(around(one.positions, 2, 16), around(other.positions, 2, 16), strict=True)
    for camera, its in pairs:
        wanted = render(one, camera)
        assert wanted.max() > 0.2
        assert render(other, its) == pytest.approx(wanted, abs=1e-9)
        assert its.near == pytest.approx(factor * camera.near)


@pytest.mark.parametrize(("depth", "near", "seen"), [(0.3, 0.2, 1), (0.3, 0.4, 0), (0.1, 0.2, 0)])
def test_a_camera_sees_from_its_near_plane_on(depth, near, seen):
    attributes = np.zeros((1, 11))
    attributes[0, 4] = 1
    camera = look_at([0, 0, -depth], [0, 0, 0], 24, 8, 8, near)
    assert len(project(*map(torch.tensor, (np.zeros((1, 3)), attributes)), camera).rows) == seen
    assert {each.near for each in ring(3, near=near)} == {near}
    assert {each.near for each in ring(3)} == {0.2}


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_only_directions_decide_whether_a_camera_has_an_upright(size):
    camera = look_at([size, 0.1 * size, 0], [0, 0, 0], 24, 8, 8)
    assert camera.rotation @ camera.rotation.T == pytest.approx(np.eye(3), abs=1e-12)
    for place in ([0, size, 0], [0, 0, 0]):
        with pytest.raises(UsageError, match="can't be at its target, nor right above or below"):
            look_at(place, [0, 0, 0], 24, 8, 8)
