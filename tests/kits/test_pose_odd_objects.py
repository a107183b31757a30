"""Objects and sets of poses that are odd or wrong: meshes of files, and folders in BOP's form."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.pose.bop import BopSettings
from smallfry.kits.pose.data import model_options
from smallfry.kits.pose.mesh import Mesh, read_mesh, require_closed
from smallfry.kits.pose.render import rasterise
from smallfry.kits.pose.scenes import SceneSettings
from smallfry.kits.pose.truth import unpack
from smallfry_runtime.pnp import Camera, Pose

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
BOX = np.array([(q[0], q[i], q[i + 1]) for q in QUADS for i in (1, 2)])
SIZE = np.array([0.06, 0.08, 0.1])
AHEAD = Pose(np.eye(3), np.array([-0.03, -0.04, 0.5]))


def write_ply(file, vertices, triangles, scale=1000.0, colours=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    head = ["ply", "format ascii 1.0", f"element vertex {len(vertices)}"]
    head += [f"property float {axis}" for axis in "xyz"]
    head += [f"element face {len(triangles)}", "property list uchar int vertex_indices"]
    head += [f"property uchar {c}" for c in ("red", "green", "blue")] if colours is not None else []
    rows = [" ".join(f"{scale * v:.6f}" for v in vertex) for vertex in vertices]
    for i, (a, b, c) in enumerate(triangles):
        rows.append(f"3 {a} {b} {c} " + (" ".join(map(str, colours[i])) if colours else ""))
    file.write_text("\n".join([*head, "end_header", *rows]) + "\n")
    return file


def depths(mesh):
    return rasterise(mesh, AHEAD, Camera(200.0, 200.0, 24.3, 23.6), 48, 48).depth


@pytest.fixture
def trimesh():
    return pytest.importorskip("trimesh")


def test_a_box_is_read_in_metres_with_a_surface_of_close_points(trimesh, tmp_path):
    mesh = read_mesh(write_ply(tmp_path / "box.ply", CORNERS * SIZE, BOX), 0.001)
    assert np.ptp(mesh.vertices, axis=0) == pytest.approx(SIZE)
    assert len(mesh.triangles) == 12
    on_face = np.isclose(mesh.surface, 0, atol=1e-7) | np.isclose(mesh.surface, SIZE, atol=1e-7)
    assert on_face.any(axis=1).all()
    assert (mesh.surface.min(axis=0) >= -1e-7).all()
    assert len(mesh.surface) > 2 * (SIZE[0] * SIZE[1] + SIZE[0] * SIZE[2]) / 0.006**2
    seen = depths(mesh)
    assert seen[np.isfinite(seen)] == pytest.approx(0.5)  # the near face, head on


@pytest.mark.parametrize("ending", ["obj", "stl", "ply"])
def test_a_mesh_is_the_same_in_every_kind_of_file(trimesh, tmp_path, ending):
    made = trimesh.Trimesh(CORNERS * SIZE, BOX, process=False)
    made.export(tmp_path / f"box.{ending}")
    found = read_mesh(tmp_path / f"box.{ending}")
    wanted = depths(read_mesh(write_ply(tmp_path / "own.ply", CORNERS * SIZE, BOX), 0.001))
    assert np.allclose(depths(found), wanted)
    keys = np.array(model_options(tmp_path / f"box.{ending}", points=20)["keypoints"])
    assert keys.shape == (20, 3)
    assert (np.isclose(keys, 0, atol=1e-5) | np.isclose(keys, SIZE, atol=1e-5)).any(axis=1).all()


def test_a_mesh_that_is_inside_out_is_turned(trimesh, tmp_path):
    outside = read_mesh(write_ply(tmp_path / "a.ply", CORNERS * SIZE, BOX), 0.001)
    inside = read_mesh(write_ply(tmp_path / "b.ply", CORNERS * SIZE, BOX[:, ::-1]), 0.001)
    assert np.array_equal(depths(inside), depths(outside))
    a, b, c = inside.vertices[inside.triangles].swapaxes(0, 1)
    assert (np.cross(a, b) * c).sum() / 6 == pytest.approx(np.prod(SIZE))


def test_faces_keep_their_colours(trimesh, tmp_path):
    colours = [(10 * i, 255 - i, 7) for i in range(12)]
    mesh = read_mesh(write_ply(tmp_path / "a.ply", CORNERS * SIZE, BOX, colours=colours), 0.001)
    assert mesh.colours * 255 == pytest.approx(np.array(colours, float))
    plain = read_mesh(write_ply(tmp_path / "b.ply", CORNERS * SIZE, BOX), 0.001)
    assert (plain.colours == plain.colours[0, 0]).all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda v, t: (v, t[1:]), "the mesh is not closed: 6 edges belong to one triangle"),
        (lambda v, t: (v, np.vstack([t[:1, ::-1], t[1:]])), "or neighbours are wound differently"),
        (lambda v, t: (v, t[:3]), "has 3 triangles; 4 to 200,000 can be drawn"),
        (lambda v, t: (v[:2], t[:0]), "mesh"),
        (lambda v, t: (1000 * v, t), "its object is 100 metres wide, and 2 are the most: is its"),
        (lambda v, t: (v * [1, 1, np.nan], t), "a.ply: "),
        (lambda v, t: (v, t + 1), "a.ply: "),
    ],
)
def test_meshes_that_are_not_closed_or_too_large_are_refused(trimesh, tmp_path, changed, words):
    file = write_ply(tmp_path / "a.ply", *changed(CORNERS * SIZE, BOX))
    with pytest.raises(DataError, match=words):
        read_mesh(file, 0.001)


@pytest.mark.parametrize("cut", [0, 40, 300])
def test_truncated_meshes_are_refused(trimesh, tmp_path, cut):
    file = write_ply(tmp_path / "a.ply", CORNERS * SIZE, BOX)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.ply: "):
        read_mesh(file, 0.001)


def test_a_unit_that_was_forgotten_is_named(trimesh, tmp_path):
    file = write_ply(tmp_path / "a.ply", CORNERS * SIZE, BOX)
    options = {"pictures": 10, "mesh": str(file)}
    with pytest.raises(DataError, match=r"a millimetre\? Set data.options.millimetres"):
        load_data("pose-objects", options=options)
    write_ply(file, CORNERS * SIZE, BOX, scale=1.0)
    with pytest.raises(DataError, match="128 keypoints were asked for, and the surface has 8"):
        load_data("pose-objects", options={**options, "millimetres": True})


def test_two_bodies_that_touch_in_an_edge_are_closed():
    moved = CORNERS + np.array([1, 1, 0])
    vertices, triangles = np.vstack([CORNERS, moved]), np.vstack([BOX, BOX + 8])
    require_closed(vertices, triangles, "two boxes")
    with pytest.raises(DataError, match="two boxes: the mesh is not closed"):
        require_closed(vertices, triangles[:-1], "two boxes")
    with pytest.raises(DataError, match="a triangle's corner is not among its 16 vertices"):
        require_closed(vertices, triangles - 1, "two boxes")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"jitter": float("nan")}, "jitter is out of range, got nan"),
        ({"hidden": 1.1}, "hidden is out of range, got 1.1"),
        ({"test_jitter": -0.1}, "test_jitter is out of range"),
        ({"seed": -1}, "shape and seed are whole numbers from 0"),
        ({"pictures": 1_000_001}, "pictures is 10 to 1,000,000, got 1000001"),
    ],
)
def test_impossible_settings_of_pictures_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        SceneSettings(**settings)
    with pytest.raises(UsageError, match="object is a number from 0, and seen is 0 to 1, got "):
        BopSettings(seen=float("nan"))


VIEWS = 3


@pytest.fixture
def bop(trimesh, tmp_path):
    """A box that stands turned before the camera, in three pictures of 64×48 pixels."""
    write_ply(tmp_path / "models" / "obj_000001.ply", (CORNERS - 0.5) * SIZE, BOX)
    scene = tmp_path / "train_pbr" / "000000"
    (scene / "rgb").mkdir(parents=True)
    cameras, truth = {}, {}
    for number in range(VIEWS):
        cameras[number] = {"cam_K": [80.0, 0, 31.5, 0, 80.0, 23.5, 0, 0, 1]}
        angle = 0.4 * number
        turn = [np.cos(angle), 0, np.sin(angle), 0, 1, 0, -np.sin(angle), 0, np.cos(angle)]
        truth[number] = [{"obj_id": 1, "cam_R_m2c": turn, "cam_t_m2c": [20.0 * number, 0, 400]}]
        Image.new("RGB", (64, 48), (0, 50, 0)).save(scene / "rgb" / f"{number:06d}.png")
    for name, content in (("camera", cameras), ("gt", truth)):
        (scene / f"scene_{name}.json").write_text(json.dumps(content))
    return tmp_path


def load(folder, **options):
    return load_data("pose-bop", root=folder, options=options, validation=0.0, test=0.0)


def change(bop, name, edit):
    file = bop / "train_pbr" / "000000" / f"scene_{name}.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    edit(content)
    file.write_text(json.dumps(content))


def test_poses_cameras_and_crops_are_those_of_the_files(bop):
    data = load(bop)
    order = data.train.rows.argsort()
    truth, images = unpack(data.train.labels[order]), data.train.images[order]
    assert data.input_shape == (3, 128, 128)
    assert torch.allclose(truth.translation[:, 0], torch.tensor([0.0, 0.02, 0.04]))
    assert torch.allclose(truth.translation[:, 2], torch.tensor([0.4] * VIEWS))
    assert truth.camera.tolist() == [[80.0, 80.0, 31.5, 23.5]] * VIEWS
    assert not truth.symmetric.any()
    for number in range(VIEWS):
        x, y, side = truth.crop[number].tolist()
        low, high = truth.pixels[number].amin(0), truth.pixels[number].amax(0)
        assert side == pytest.approx(1.5 * (high - low).max().item(), abs=1)
        assert (low + high).tolist() == pytest.approx([2 * x + side, 2 * y + side], abs=2)
    seen = truth.masks[:, 0] > 0
    assert torch.equal(truth.masks[:, 0], truth.masks[:, 1])  # rendered, as there are no files
    assert 0.2 < seen.float().mean() < 0.7
    outside = images[:, 1] == 0  # where the crop leaves the picture
    assert outside.float().mean() < 0.5
    assert ((images[:, 1] == 50) | outside).float().mean() > 0.97


@pytest.mark.parametrize(
    ("about", "symmetric"),
    [
        ('{"1": {}}', False),
        ('{"1": {"symmetries_discrete": [[1]]}}', True),
        ('{"1": {"symmetries_continuous": [{"axis": [0, 0, 1]}]}}', True),
        ('{"2": {"symmetries_discrete": [[1]]}}', False),
    ],
)
def test_symmetries_are_of_the_object_alone(bop, about, symmetric):
    (bop / "models" / "models_info.json").write_text(about)
    assert unpack(load(bop).train.labels).symmetric.tolist() == [float(symmetric)] * VIEWS


def test_hardly_seen_objects_are_left_out_and_others_kept(bop):
    seen = {"0": [{"visib_fract": 0.05}], "1": [{"visib_fract": 1}], "2": [{}]}
    change(bop, "gt_info", lambda content: content.update(seen))
    assert len(load(bop).train) == 2
    assert len(load(bop, seen=0.0).train) == 3
    change(bop, "gt_info", lambda content: content.pop("0"))
    assert len(load(bop).train) == 3  # of which nothing is stated
    (bop / "models" / "obj_000001.ply").rename(bop / "models" / "obj_000000.ply")
    with pytest.raises(DataError, match="train_pbr: has no view of object 0"):
        load(bop, object=0)


def test_grey_pictures_and_masks_of_files_are_read(bop):
    scene = bop / "train_pbr" / "000000"
    (scene / "rgb" / "000001.png").unlink()
    (scene / "gray").mkdir()
    Image.new("L", (64, 48), 90).save(scene / "gray" / "000001.tif")
    for kind, columns in (("mask_visib", 40), ("mask", 64)):
        (scene / kind).mkdir()
        values = np.zeros((48, 64), np.uint8)
        values[:, 20:columns] = 255
        Image.fromarray(values).save(scene / kind / "000001_000000.png")
    data = load(bop)
    (place,) = (data.train.rows == 1).nonzero()[0].tolist()
    assert data.train.images[place].unique().tolist() == [90]
    seen, whole = unpack(data.train.labels).masks[place]
    assert (seen <= whole).all()
    assert seen.sum() < whole.sum()
    Image.new("L", (64, 47)).save(scene / "mask" / "000001_000000.png")
    with pytest.raises(DataError, match=r"000001_000000.png: is not of the size of its picture"):
        load(bop)


MIRRORED = [-1, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("gt", lambda c: c["1"][0].update(cam_R_m2c=MIRRORED), "picture 1: its cam_R_m2c is no"),
        ("gt", lambda c: c["1"][0].update(cam_t_m2c=[0, 0, -400]), "is behind the camera"),
        ("gt", lambda c: c["1"][0].update(cam_t_m2c=[0, 0, 0]), "is behind the camera"),
        ("gt", lambda c: c["1"][0].update(cam_t_m2c=[0, 0, True]), "needs cam_R_m2c of nine"),
        ("gt", lambda c: c["1"][0].update(cam_t_m2c="far"), "needs cam_R_m2c of nine numbers and"),
        ("gt", lambda c: c["1"][0].pop("cam_R_m2c"), "needs cam_R_m2c of nine numbers"),
        ("gt", lambda c: c.update({"1": {"obj_id": 1}}), "picture 1: needs a list with an entry"),
        ("gt", lambda c: c.update({"1": [3]}), "picture 1: needs a list with an entry for each"),
        ("gt", lambda c: c.update({"first": []}), "entries by numbers of pictures, not 'first'"),
        ("gt", lambda c: c.update({"-1": []}), "entries by numbers of pictures, not '-1'"),
        ("gt_info", lambda c: c.update({"1": []}), "has 1 objects, and scene_gt_info.json 0"),
        ("gt_info", lambda c: c.update({"1": 3}), "picture 1: needs a list with an entry"),
        (
            "gt_info",
            lambda c: c.update({"1": [{"visib_fract": "all"}]}),
            "picture 1: its visib_fract is no number: 'all'",
        ),
        ("camera", lambda c: c["1"].update(cam_K=[80.0] * 8), "its camera has no intrinsics"),
        ("camera", lambda c: c["1"].update(cam_K=[np.nan] * 9), "its camera has no intrinsics"),
        ("camera", lambda c: c["1"].update(cam_K=[[80, 0, 0]] * 3), "its camera has no intrinsics"),
        ("camera", lambda c: c.update({"1": [80.0]}), "its camera has no intrinsics"),
        ("camera", lambda c: c["1"].pop("cam_K"), "picture 1: its camera has no intrinsics"),
    ],
)
def test_wrong_entries_of_scenes_are_refused(bop, name, edit, words):
    change(bop, name, edit)
    with pytest.raises(DataError, match=words):
        load(bop)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train_pbr/000000/scene_gt.json", b"{", "can't be read as JSON"),
        ("train_pbr/000000/scene_camera.json", b"\xff\xfe", "can't be read as JSON"),
        ("train_pbr/000000/scene_gt_info.json", b"3", "has no entries by the numbers"),
        ("models/models_info.json", b"[]", "has no entries by the numbers"),
        ("models/models_info.json", b'{"1": [1]}', "has no entries for object 1"),
        ("train_pbr/000000/rgb/000002.png", b"no picture", "000002.png: "),
    ],
)
def test_damaged_files_of_scenes_are_refused(bop, name, content, words):
    (bop / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load(bop)


@pytest.mark.parametrize("name", ["scene_gt.json", "scene_camera.json"])
def test_missing_files_of_scenes_are_named(bop, name):
    (bop / "train_pbr" / "000000" / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: can't be read as JSON"):
        load(bop)


def test_an_object_that_reaches_behind_the_camera_is_refused():
    mesh = Mesh(CORNERS - 0.5, BOX, np.ones((12, 3)), CORNERS)
    with pytest.raises(UsageError, match="must be before the camera: its pose has depths below"):
        rasterise(mesh, Pose(np.eye(3), np.array([0, 0, 0.5])), Camera(9, 9, 4, 4), 8, 8)


def test_objects_partly_behind_the_camera_or_beyond_any_picture_are_refused(bop):
    change(bop, "gt", lambda content: content["1"][0].update(cam_t_m2c=[0, 0, 20]))
    with pytest.raises(DataError, match=r"000001\.png: a part .* is 0\.0\d+ m behind the camera"):
        load(bop)
    change(bop, "gt", lambda content: content["1"][0].update(cam_t_m2c=[0, 0, 70]))
    assert len(load(bop).train) == VIEWS
    far = [80_000.0, 0, 31.5, 0, 80_000.0, 23.5, 0, 0, 1]
    change(bop, "camera", lambda content: content["1"].update(cam_K=far))
    with pytest.raises(DataError, match=r"000001\.png: the object has a box of \d+ pixels"):
        load(bop)
