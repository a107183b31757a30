"""Meshes, renders, poses from points, and codes: against ray casting, OpenCV and closed forms."""

import numpy as np
import pytest
import torch

from smallfry.errors import DataError, UsageError
from smallfry.kits.pose.mesh import Mesh, farthest_points, generated_mesh, keypoints, require_closed
from smallfry.kits.pose.metrics import add, adi, area_under, diameter, rotation_error
from smallfry.kits.pose.render import crop_camera, rasterise, shade
from smallfry.kits.pose.scenes import CAMERA, rotation_of
from smallfry.kits.pose.truth import Truth, codes, pack, unpack
from smallfry_runtime import pnp
from smallfry_runtime.decoders.pose import cells_of, decode, estimate, places
from smallfry_runtime.pnp import Camera, Pose, linear_pose, project, refine, solve


def turn(axis, angle):
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def random_poses(count, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        quaternion = random.normal(size=4)
        shift = np.array([*random.uniform(-0.15, 0.15, 2), random.uniform(0.5, 1.0)])
        yield Pose(rotation_of(quaternion / np.linalg.norm(quaternion)), shift)


@pytest.fixture(scope="module")
def mesh():
    return generated_mesh(0)


@pytest.mark.parametrize("seed", range(6))
def test_generated_objects_are_closed_and_of_the_right_size(seed):
    mesh = generated_mesh(seed)
    require_closed(mesh.vertices, mesh.triangles, "object")
    a, b, c = mesh.vertices[mesh.triangles].swapaxes(0, 1)
    assert (np.cross(a, b) * c).sum() > 0  # a positive volume: wound from outside
    extent = np.ptp(mesh.vertices, axis=0).max()
    assert 0.0799 < extent < 0.1501
    assert np.array_equal(generated_mesh(seed).vertices, mesh.vertices)
    points = keypoints(mesh, 128)
    assert len(np.unique(points, axis=0)) == 128
    assert diameter(points) > 0.9 * diameter(mesh.vertices)


def test_a_mesh_with_a_hole_is_refused(mesh):
    with pytest.raises(DataError, match=r"object: the mesh is not closed: 6 edges belong to one"):
        require_closed(mesh.vertices, mesh.triangles[1:], "object")
    turned = mesh.triangles.copy()
    turned[0] = turned[0][::-1]
    with pytest.raises(DataError, match="the mesh is not closed"):
        require_closed(mesh.vertices, turned, "object")
    with pytest.raises(DataError, match="a triangle's corner is not among its 3 vertices"):
        require_closed(mesh.vertices[:3], mesh.triangles, "object")
    with pytest.raises(DataError, match="9 keypoints were asked for, and the surface has 3"):
        farthest_points(mesh.vertices[:3], 9)


def test_depths_are_those_of_rays(mesh):
    camera = Camera(60.0, 62.0, 19.3, 15.8)
    for pose in random_poses(2):
        close = Pose(pose.rotation, pose.translation * np.array([0.3, 0.3, 0.4]))
        render = rasterise(mesh, close, camera, 32, 40)
        a, b, c = (mesh.vertices @ close.rotation.T + close.translation)[mesh.triangles].swapaxes(
            0, 1
        )
        normal = np.cross(b - a, c - a)
        checked = 0
        for v in range(32):
            for u in range(40):
                ray = np.array([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, 1.0])
                with np.errstate(divide="ignore", invalid="ignore"):
                    depth = (normal * a).sum(axis=1) / (normal @ ray)
                hit = depth[:, None] * ray
                sides = np.stack(
                    [
                        (np.cross(q - p, hit - p) * normal).sum(axis=1)
                        for p, q in ((a, b), (b, c), (c, a))
                    ]
                )
                inside = (sides >= -1e-15).all(axis=0) & (depth > 0)
                if inside.any():
                    checked += 1
                    assert render.depth[v, u] == pytest.approx(depth[inside].min(), abs=1e-6)
                else:
                    assert render.triangle[v, u] == -1
        assert checked > 50


def test_a_sphere_is_drawn_around_its_projected_centre():
    """Pixel (0, 0) has its centre at (0, 0): a half-pixel shift would move the mask's middle."""
    steps, rings = 48, 24
    polar = np.pi * np.arange(rings + 1) / rings
    around = 2 * np.pi * np.arange(steps) / steps
    grid = np.stack(
        [
            np.sin(polar)[:, None] * np.cos(around),
            np.sin(polar)[:, None] * np.sin(around),
            np.broadcast_to(np.cos(polar)[:, None], (rings + 1, steps)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    faces = []
    for i in range(rings):
        for j in range(steps):
            one, two = i * steps + j, i * steps + (j + 1) % steps
            faces += [(one, one + steps, two + steps), (one, two + steps, two)]
    sphere = Mesh(0.05 * grid, np.array(faces), np.full((len(faces), 3), 0.5), grid)
    camera = Camera(400.0, 400.0, 31.5, 23.5)
    render = rasterise(sphere, Pose(np.eye(3), np.array([0, 0, 1.0])), camera, 48, 64)
    rows, columns = np.nonzero(render.triangle >= 0)
    assert columns.mean() == pytest.approx(31.5, abs=0.05)
    assert rows.mean() == pytest.approx(23.5, abs=0.05)
    assert render.depth.min() == pytest.approx(0.95, abs=2e-3)
    radius = np.sqrt(len(rows) / np.pi)
    assert radius == pytest.approx(400 * 0.05 / np.sqrt(1 - 0.05**2), rel=0.02)
    light = np.array([0.0, 0.0, -1.0])
    colours = shade(sphere, Pose(np.eye(3), np.array([0, 0, 1.0])), camera, render, light, 0.2)
    middle = (rows == 23) & (columns == 31)
    assert colours[middle][0] == pytest.approx(np.full(3, 0.5), abs=0.01)


def test_seen_corners_are_on_the_mask(mesh):
    for pose in random_poses(4, seed=1):
        camera = crop_camera(CAMERA, (200, 120, 220), 128)
        render = rasterise(mesh, pose, camera, 128, 128)
        seen = np.unique(mesh.triangles[render.triangle[render.triangle >= 0]])
        grown = np.pad(render.triangle >= 0, 1)
        for u, v in project(mesh.vertices[seen], pose, camera):
            column, row = round(u) + 1, round(v) + 1
            if 1 <= column <= 128 and 1 <= row <= 128:
                assert grown[row - 1 : row + 2, column - 1 : column + 2].any()


def test_a_crop_has_a_camera_of_its_own():
    camera = crop_camera(CAMERA, (100, 50, 64), 128)
    point = np.array([[0.02, -0.03, 0.7]])
    whole = project(point, Pose(np.eye(3), np.zeros(3)), CAMERA)[0]
    crop = project(point, Pose(np.eye(3), np.zeros(3)), camera)[0]
    assert crop == pytest.approx((whole - [100, 50] + 0.5) * 2 - 0.5)


def test_objects_behind_the_camera_are_refused(mesh):
    with pytest.raises(UsageError, match="must be before the camera"):
        rasterise(mesh, Pose(np.eye(3), np.array([0, 0, 0.01])), CAMERA, 8, 8)


GOLDEN = np.array([[0.05 * np.sin(0.9 * (3 * i + j) + 0.2) for j in range(3)] for i in range(20)])
POINTS = np.random.default_rng(7).uniform(-0.05, 0.05, (20, 3))  # the golden ones are in a plane
TRUE = Pose(turn([1, 2, 3], 0.7), np.array([0.01, -0.02, 0.8]))
OTHER = Pose(turn([1, 2, 2.5], 0.8), np.array([0.012, -0.018, 0.81]))


def test_errors_of_poses_are_the_golden_ones():
    assert add(GOLDEN, TRUE, OTHER) == pytest.approx(0.011423924, abs=1e-9)
    assert adi(GOLDEN, TRUE, OTHER) == pytest.approx(0.010138538, abs=1e-9)
    assert adi(GOLDEN, OTHER, TRUE) == pytest.approx(0.01017732, abs=1e-9)
    assert rotation_error(TRUE.rotation, OTHER.rotation) == pytest.approx(6.8395085, abs=1e-7)
    assert rotation_error(TRUE.rotation, TRUE.rotation) == pytest.approx(0, abs=1e-5)


def test_the_area_under_the_curve_is_a_sum_over_thresholds():
    errors = np.random.default_rng(0).uniform(0, 0.2, 300)
    thresholds = np.linspace(0, 0.1, 20_001)
    shares = (errors[None] < thresholds[:, None]).mean(axis=1)
    assert area_under(errors, 0.1) == pytest.approx(
        np.trapezoid(shares, thresholds) / 0.1, abs=1e-4
    )
    assert area_under(errors[:0], 0.1) == 0


@pytest.mark.parametrize("pose", [*random_poses(5, seed=2)])
def test_exact_places_give_the_pose(pose):
    pixels = project(POINTS, pose, CAMERA)
    for found in (linear_pose(POINTS, pixels, CAMERA), solve(POINTS, pixels, CAMERA, 2.0).pose):
        assert np.abs(found.rotation - pose.rotation).max() < 1e-6
        assert np.abs(found.translation - pose.translation).max() < 1e-6


def test_refined_poses_have_no_slope():
    random = np.random.default_rng(0)
    pixels = project(POINTS, TRUE, CAMERA) + random.normal(0, 2, (20, 2))
    found = refine(POINTS, pixels, CAMERA, OTHER)

    def cost(vector):
        pose = Pose(pnp._rotation(vector[:3]) @ found.rotation, found.translation + vector[3:])
        return np.square(project(POINTS, pose, CAMERA) - pixels).sum()

    for axis in range(6):
        step = np.zeros(6)
        step[axis] = 1e-5
        assert cost(step) > cost(np.zeros(6))
        assert cost(-step) > cost(np.zeros(6))


def test_poses_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    random = np.random.default_rng(1)
    matrix = np.array([[CAMERA.fx, 0, CAMERA.cx], [0, CAMERA.fy, CAMERA.cy], [0, 0, 1]])
    for pose in random_poses(5, seed=3):
        exact = project(POINTS, pose, CAMERA)
        rotation, _ = cv2.Rodrigues(pose.rotation)
        theirs = cv2.projectPoints(POINTS, rotation, pose.translation, matrix, None)[0][:, 0]
        assert np.abs(theirs - exact).max() < 1e-9
        pixels = exact + random.uniform(-1, 1, exact.shape)
        own = estimate(POINTS, pixels, CAMERA, 4.0).pose
        other = estimate(POINTS, pixels, CAMERA, 4.0, solver="opencv").pose
        assert np.abs(own.rotation - other.rotation).max() < 1e-3
        assert np.abs(own.translation - other.translation).max() < 1e-3


@pytest.mark.parametrize("solver", ["own", "opencv"])
def test_wrong_points_are_left_out(solver):
    if solver == "opencv":
        pytest.importorskip("cv2")
    random = np.random.default_rng(2)
    points = random.uniform(-0.06, 0.06, (60, 3))
    pixels = project(points, TRUE, CAMERA)
    pixels[:15] = random.uniform(200, 440, (15, 2))
    found = estimate(points, pixels, CAMERA, 1.0, solver)
    assert add(points, TRUE, found.pose) < 1e-3
    assert 45 <= found.inliers <= 47


@pytest.mark.parametrize("solver", ["own", "opencv"])
def test_too_few_points_have_no_pose(solver):
    assert estimate(POINTS[:5], POINTS[:5, :2], CAMERA, 1.0, solver) == (None, 0)
    assert solve(POINTS[:5], POINTS[:5, :2], CAMERA, 1.0) is None


def test_points_that_fix_no_pose_raise_nothing():
    random = np.random.default_rng(0)
    for pixels in (np.zeros((8, 2)), random.uniform(0, 9, (8, 2)), np.full((8, 2), 1e6)):
        for points in (POINTS[:8], np.zeros((8, 3)), np.repeat(POINTS[:4], 2, axis=0)):
            solve(points, pixels, CAMERA, 1.0)


def truth_of(points, pose, crop, cells=32):
    masks = np.zeros((2, cells, cells), bool)
    row = pack(pose, CAMERA, crop, False, project(points, pose, CAMERA), masks)
    return unpack(torch.from_numpy(row)[None])


def test_codes_are_the_golden_ones():
    pixels = [[100.0, 50.0], [291.9, 241.9], [150.5, 99.25], [99.9, 60.0], [292.0, 60.0]]
    truth = Truth(
        *(torch.zeros(1, 1) for _ in range(3)),
        torch.tensor([[100.0, 50.0, 192.0]], dtype=torch.float64),
        torch.zeros(1),
        torch.tensor([pixels], dtype=torch.float64),
        torch.zeros(1, 2, 64, 64),
    )
    found = codes(truth, 6)
    assert found.inside[0].tolist() == [1, 1, 1, 0, 0]
    bits = [[0] * 6, [1] * 6, [0, 1, 0, 0, 0, 0], [0] * 6, [1] * 6]
    assert found.x[0].T.tolist() == bits
    assert cells_of(found.x.numpy())[0].tolist() == [0, 63, 16, 0, 63]
    assert cells_of(found.y.numpy())[0].tolist() == [0, 63, 16, 3, 3]
    middle = [[101.5, 51.5], [290.5, 240.5], [149.5, 99.5], [101.5, 60.5], [290.5, 60.5]]
    outputs = {"x": found.x.numpy(), "y": found.y.numpy()}
    assert places(outputs, truth.crop.numpy())[0].tolist() == middle


def test_every_cell_is_decoded_to_its_middle():
    x, y = (each.ravel() for each in np.meshgrid(np.arange(64), np.arange(64)))
    bits = [((n[None] >> np.arange(5, -1, -1)[:, None]) & 1)[None] - 0.5 for n in (x, y)]
    outputs = {"x": bits[0], "y": bits[1]}
    found = places(outputs, np.array([[10.0, 20.0, 96.0]]))[0]
    assert np.array_equal(found, np.stack([10 + (x + 0.5) * 1.5, 20 + (y + 0.5) * 1.5], axis=1))


def exact(points, pose, crop, moved=0.0):
    truth = truth_of(points, pose, crop)
    wanted = codes(truth, 5)
    outputs = {"x": wanted.x.numpy() - 0.5, "y": wanted.y.numpy() - 0.5}
    pixels = places(outputs, truth.crop.double().numpy())[0]
    kept = wanted.inside[0].numpy() > 0
    cell = crop[2] / 32
    apart = np.linalg.norm(pixels - truth.pixels[0].numpy(), axis=1)[kept]
    assert apart.max() <= cell / np.sqrt(2) + 1e-4
    return estimate(points[kept], pixels[kept] + moved * cell, CAMERA, cell).pose


def test_exact_codes_give_poses_and_corners_worse_ones(mesh):
    points = keypoints(mesh, 128)
    size = diameter(points)
    middles, corners = [], []
    for pose in random_poses(16, seed=5):
        pixels = project(mesh.vertices, pose, CAMERA)
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        side = round(1.5 * (high - low).max())
        first = np.rint((low + high) / 2 - side / 2).astype(int)
        crop = (int(first[0]), int(first[1]), side)
        middles.append(add(points, pose, exact(points, pose, crop)) / size)
        corners.append(add(points, pose, exact(points, pose, crop, moved=-0.5)) / size)
    assert np.mean(middles) < 0.025
    assert max(middles) < 0.1
    assert np.mean(corners) > 1.3 * np.mean(middles)


def outputs_of(pose, crop):
    found = codes(truth_of(POINTS, pose, crop), 5)
    return {
        "in_roi": found.inside[:, None].numpy() - 0.5,
        "x": found.x.numpy() - 0.5,
        "y": found.y.numpy() - 0.5,
        "points": POINTS[None],
    }


CROP = [270, 160, 120]


def test_codes_are_decoded_to_a_pose():
    outputs = outputs_of(TRUE, CROP)
    settings = {"camera": [*CAMERA], "crop": CROP}
    (found,) = decode(outputs, ("mug",), settings)
    assert found["object"] == "mug"
    pose = Pose(*(np.array(found["pose"][name]) for name in ("rotation", "translation")))
    assert add(POINTS, TRUE, pose) < 0.2 * diameter(POINTS)  # of 20 points in cells of 3.75 pixels
    assert found["inliers"] >= 18
    assert decode(outputs, ("mug",), {**settings, "crop": [CROP]})[0] == found
    nothing = {**outputs, "in_roi": -np.ones((1, 1, 20))}
    (lost,) = decode(nothing, ("mug",), settings)
    assert (lost["pose"], lost["inliers"]) == (None, 0)
    assert lost["keypoints"] == [None] * 20


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": CROP}, "a pose needs the camera's intrinsics: set camera to"),
        ({"camera": [0, 572, 320, 240], "crop": CROP}, "with fx and fy above 0"),
        ({"camera": [572, 572, 320], "crop": CROP}, "set camera to"),
        ({"camera": [*CAMERA]}, "a pose needs the square of the picture"),
        ({"camera": [*CAMERA], "crop": [0, 0, 0]}, "set crop to"),
        ({"camera": [*CAMERA], "crop": [CROP, CROP]}, "crop has 2 squares for 1 inputs"),
        ({"camera": [*CAMERA], "crop": CROP, "solver": "fast"}, "solver is own or opencv"),
        ({"mesh": "a"}, "decoding has the settings camera, crop, solver and seed"),
    ],
)
def test_wrong_settings_of_decoding_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        decode(outputs_of(TRUE, CROP), ("mug",), settings)


def test_a_missing_opencv_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(UsageError, match="pip install opencv-python-headless, or take own"):
        estimate(POINTS, project(POINTS, TRUE, CAMERA), CAMERA, 1.0, "opencv")
