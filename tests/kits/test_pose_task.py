"""The task of poses: pictures and truth, scores, folders in BOP's form, and a run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.pose.data import model_options
from smallfry.kits.pose.losses import mask_loss, place_loss, terms
from smallfry.kits.pose.mesh import generated_mesh, keypoints, read_mesh
from smallfry.kits.pose.models import PoseCodes
from smallfry.kits.pose.scenes import (
    CAMERA,
    SceneSettings,
    draw_scene,
    is_test_rotation,
    rotation_of,
)
from smallfry.kits.pose.task import PoseTask
from smallfry.kits.pose.truth import codes, unpack
from smallfry.tasks import HasRecipe, Pictured, create_task, find_task
from smallfry_runtime.pnp import project
from smallfry_runtime.runtime import Runtime

FEW = {"pictures": 30}


@pytest.fixture(scope="module")
def mesh():
    return generated_mesh(0)


@pytest.fixture(scope="module")
def data():
    return load_data("pose-objects", options=FEW, validation=0.1, test=0.2)


def test_a_picture_is_a_function_of_its_number_and_split(mesh):
    settings = SceneSettings()
    one, again = (draw_scene(settings, mesh, "train", 5) for _ in range(2))
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.pose.rotation, again.pose.rotation)
    for other in (draw_scene(settings, mesh, "test", 5), draw_scene(settings, mesh, "train", 6)):
        assert not np.array_equal(one.image, other.image)
        assert np.abs(one.pose.rotation - other.pose.rotation).max() > 1e-3


def quaternion_of(rotation):
    w = np.sqrt(max(0, 1 + np.trace(rotation))) / 2
    x, y, z = rotation[2, 1], rotation[0, 2], rotation[1, 0]
    rest = np.array([x - rotation[1, 2], y - rotation[2, 0], z - rotation[0, 1]]) / (4 * w)
    return np.array([w, *rest])


def test_rotations_of_test_pictures_are_in_cells_of_their_own(mesh):
    for split in ("train", "test"):
        for number in range(20):
            pose = draw_scene(SceneSettings(), mesh, split, number, 16).pose
            found = quaternion_of(pose.rotation)
            assert np.allclose(rotation_of(found), pose.rotation, atol=1e-9)
            assert is_test_rotation(found) == (split == "test")
            assert is_test_rotation(-found) == (split == "test")


def test_what_is_hidden_is_a_part_of_the_object(mesh):
    shares = []
    for number in range(20):
        scene = draw_scene(SceneSettings(hidden=1.0), mesh, "train", number)
        assert not (scene.seen & ~scene.whole).any()
        shares.append(1 - scene.seen.sum() / scene.whole.sum())
    assert min(shares) >= 0
    assert max(shares) <= 0.4
    assert max(shares) > 0.05
    whole = draw_scene(SceneSettings(hidden=0.0), mesh, "train", 0)
    assert np.array_equal(whole.seen, whole.whole)


def test_a_data_set_has_pictures_and_truth(data, mesh):
    assert data.input_shape == (3, 128, 128)
    assert data.classes == ("shape 0",)
    assert [len(each) for each in (data.train, data.validation, data.test)] == [22, 2, 6]
    truth = unpack(data.test.labels)
    scene = draw_scene(SceneSettings(**FEW), mesh, "test", 2)
    points = keypoints(mesh, 128)
    assert np.array_equal(data.test.images[2].numpy(), scene.image)
    assert_close(truth.rotation[2].double().numpy(), scene.pose.rotation, atol=1e-6, rtol=0)
    pixels = project(points, scene.pose, CAMERA)
    assert np.abs(truth.pixels[2].numpy() - pixels).max() < 1e-2
    assert truth.crop[2].tolist() == list(scene.crop)
    assert np.array_equal(truth.masks[2, 0].numpy() > 0, scene.seen[2::4, 2::4])
    assert codes(truth, 5).inside.mean() > 0.95


def exact_outputs(truth, points, wrong=0):
    """Return outputs whose codes are the true ones but for some keypoints."""
    found = codes(truth, 5)
    x = found.x.clone()
    x[:, 0, :wrong] = 1 - x[:, 0, :wrong]
    batch = len(truth.crop)
    return PoseCodes(
        20 * found.inside[:, None] - 10,
        20 * x - 10,
        20 * found.y - 10,
        20 * truth.masks - 10,
        points.expand(batch, -1, -1),
        true_places(truth),
    )


def true_places(truth):
    """Return columns and rows as shares of the crop's side, (batch, 2, points)."""
    return ((truth.pixels - truth.crop[:, None, :2]) / truth.crop[:, None, 2:]).transpose(1, 2)


@pytest.fixture(scope="module")
def points(mesh):
    return torch.from_numpy(keypoints(mesh, 128)).float()


def test_exact_codes_score_fully(data, points):
    found = PoseTask().metrics(exact_outputs(unpack(data.test.labels), points), data.test.labels)
    assert found["accuracy"] == 1
    assert found["mean_error"] < 0.05
    assert found["rotation_error"] < 5
    assert found["no_pose"] == 0
    assert 0.9 < found["auc"] < 1
    assert all(found[f"bit_{bit}"] == 1 for bit in range(1, 6))
    assert (found["in_roi"], found["mask_iou"]) == (1, 1)
    assert found["loss"] < 0.01
    assert PoseTask().rank(found) == (1, -found["loss"])


def test_bits_are_scored_given_those_before(data, points):
    truth = unpack(data.test.labels)
    outputs = exact_outputs(truth, points, wrong=32)
    inside = codes(truth, 5).inside
    share = inside[:, :32].sum() / inside.sum() / 2  # of x alone
    found = PoseTask().metrics(outputs, data.test.labels)
    assert found["bit_1"] == pytest.approx(1 - share.item(), abs=1e-6)
    assert found["bit_2"] == 1
    assert PoseTask().right(outputs, truth).sum() == 0
    assert PoseTask().right(exact_outputs(truth, points), truth).all()


def test_no_keypoints_are_no_pose(data, points):
    outputs = exact_outputs(unpack(data.test.labels), points)
    found = PoseTask().metrics(
        outputs._replace(in_roi=-torch.ones_like(outputs.in_roi)), data.test.labels
    )
    assert (found["no_pose"], found["accuracy"], found["mean_error"]) == (1, 0, 10)


def test_symmetric_objects_are_scored_by_the_nearest_points(points):
    data = load_data("pose-objects", options={**FEW, "symmetric": True}, test=0.2)
    truth = unpack(data.test.labels)
    assert truth.symmetric.all()
    found = PoseTask().metrics(exact_outputs(truth, points, wrong=10), data.test.labels)
    plain = PoseTask().metrics(
        exact_outputs(truth, points, wrong=10),
        torch.where(torch.arange(data.test.labels.shape[1]) == 19, 0.0, data.test.labels),
    )
    assert found["mean_error"] < plain["mean_error"]


def test_keypoints_of_another_object_are_refused(data):
    other = torch.from_numpy(keypoints(generated_mesh(1), 128)).float()
    outputs = exact_outputs(unpack(data.test.labels), other)
    with pytest.raises(DataError, match="keypoints are of another object than the data's"):
        PoseTask().metrics(outputs, data.test.labels)


def test_places_are_drawn_to_the_true_ones(data):
    truth = unpack(data.test.labels)
    places = true_places(truth)
    assert place_loss(places, truth).max() < 0.02  # points beside the crop by a fifth of its side
    apart = places.clone()
    apart[:, 0] += 0.25
    assert_close(
        place_loss(apart, truth) - place_loss(places, truth),
        torch.full((len(places),), 0.125),
        atol=0.02,
        rtol=0,
    )


def test_the_loss_is_the_sum_of_its_terms(data, points):
    truth = unpack(data.test.labels)
    outputs = PoseCodes(*(torch.randn_like(each) for each in exact_outputs(truth, points)))
    parts = terms(outputs, truth)
    assert {*parts} == {"in_roi", "x", "y", "seen", "whole", "places"}
    task = PoseTask()
    assert_close(task.losses(outputs, truth), sum(task.terms(outputs, truth).values()))
    assert_close(task.loss(outputs, truth), task.losses(outputs, truth).mean())
    assert_close(parts["seen"], mask_loss(outputs.masks[:, 0], truth.masks[:, 0]))


def test_the_task_is_found_with_its_recipe():
    kind = find_task("pose")
    assert kind is PoseTask
    assert isinstance(kind, HasRecipe)
    assert isinstance(kind(), Pictured)
    assert kind().outputs(1) == 1
    with pytest.raises(UsageError, match="leave out label_smoothing"):
        create_task(kind.name, 0.1)
    with pytest.raises(DataError, match=r"needs pictures with poses: name generated ones"):
        kind().targets(torch.zeros(3), torch.zeros(3))
    with pytest.raises(DataError, match="needs pictures with poses"):
        unpack(torch.zeros(3, 60))


def test_poses_and_keypoints_are_drawn(data, points, tmp_path):
    outputs = exact_outputs(unpack(data.test.labels), points, wrong=60)
    PoseTask().draw(outputs, data.test, data.classes, tmp_path)
    for name in ("poses.png", "keypoints.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("pose") / "run"
    asked = ["train", "--task", "pose", "--data.options", json.dumps(FEW), "--epochs", "1"]
    asked += ["--data.test", "0.2", "--data.validation", "0.1"]
    assert main([*asked, "--progress", "quiet", "--run", str(place)]) == 0
    return place


def test_the_task_alone_is_a_run(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["task"] == "pose"
    assert summary["model"]["name"] == "checkerpose_s"
    assert {"accuracy", "auc", "bit_5"} < {*summary["measured"]["test"]}
    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["loss"] == pytest.approx(summary["measured"]["test"]["loss"], rel=1e-5)


def test_a_picture_is_decoded_with_a_camera(run, tmp_path, capsys):
    Image.new("RGB", (128, 128), "grey").save(tmp_path / "crop.png")
    asked = ["predict", str(run), str(tmp_path / "crop.png"), "--json"]
    assert (
        main([*asked, "--decoding", "{camera: [572, 572, 320, 240], crop: [200, 100, 128]}"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert {"object", "pose", "inliers", "keypoints"} < {*answer}
    assert main(asked) == 2
    assert "a pose needs the camera's intrinsics" in capsys.readouterr().err


@pytest.mark.slow
def test_an_export_has_the_same_codes(run, tmp_path):
    runtime = Runtime(smallfry.export(run, tmp_path / "export"))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 128, 128), np.uint8)
    settings = {"camera": [*CAMERA], "crop": [100, 100, 128]}
    found = runtime.decode(pixels, settings=settings)
    wanted = smallfry.load(run).decode(pixels, settings)
    for one, other in zip(found, wanted, strict=True):
        assert one["keypoints"] == other["keypoints"]
        assert one["inliers"] == other["inliers"]


def write_ply(file, mesh, triangles):
    file.parent.mkdir(parents=True, exist_ok=True)
    head = ["ply", "format ascii 1.0", f"element vertex {len(mesh.vertices)}"]
    head += [f"property float {axis}" for axis in "xyz"]
    head += [f"element face {len(triangles)}", "property list uchar int vertex_indices"]
    rows = [" ".join(f"{1000 * v:.6f}" for v in vertex) for vertex in mesh.vertices]
    rows += [f"3 {a} {b} {c}" for a, b, c in triangles]
    file.write_text("\n".join([*head, "end_header", *rows]) + "\n")


def test_a_mesh_of_ones_own_is_read_and_its_holes_refused(mesh, tmp_path):
    pytest.importorskip("trimesh")
    write_ply(tmp_path / "own.ply", mesh, mesh.triangles)
    read = read_mesh(tmp_path / "own.ply", scale=0.001)
    assert len(read.triangles) == len(mesh.triangles)
    options = model_options(tmp_path / "own.ply", millimetres=True, points=40)
    assert np.array(options["keypoints"]).shape == (40, 3)
    asked = {"pictures": 10, "mesh": str(tmp_path / "own.ply"), "millimetres": True}
    own = load_data("pose-objects", options=asked, test=0.2)
    assert own.classes == ("own",)
    assert own.generated["mesh"] == "own.ply"
    write_ply(tmp_path / "hole.ply", mesh, mesh.triangles[1:])
    with pytest.raises(DataError, match=r"hole.ply: the mesh is not closed"):
        read_mesh(tmp_path / "hole.ply", scale=0.001)
    (tmp_path / "no.ply").write_text("no mesh")
    with pytest.raises(DataError, match=r"no.ply: trimesh can't read it as a mesh"):
        read_mesh(tmp_path / "no.ply")


@pytest.fixture
def bop(mesh, tmp_path):
    pytest.importorskip("trimesh")
    write_ply(tmp_path / "models" / "obj_000003.ply", mesh, mesh.triangles)
    (tmp_path / "models" / "models_info.json").write_text('{"3": {"symmetries_discrete": []}}')
    scene = tmp_path / "train_pbr" / "000000"
    cameras, truth = {}, {}
    for number in range(4):
        pose = draw_scene(SceneSettings(), mesh, "train", number, 16).pose
        cameras[number] = {"cam_K": [572.0, 0, 319.5, 0, 572.0, 239.5, 0, 0, 1]}
        truth[number] = [
            {"obj_id": 8, "cam_R_m2c": [], "cam_t_m2c": []},
            {
                "obj_id": 3,
                "cam_R_m2c": pose.rotation.ravel().tolist(),
                "cam_t_m2c": (1000 * pose.translation).tolist(),
            },
        ]
        (scene / "rgb").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (640, 480), (10 * number, 0, 0)).save(scene / "rgb" / f"{number:06d}.png")
    seen = {n: [{}, {"visib_fract": 0.05 if n == 3 else 0.9}] for n in range(4)}
    for name, content in (("camera", cameras), ("gt", truth), ("gt_info", seen)):
        (scene / f"scene_{name}.json").write_text(json.dumps(content))
    mask = np.zeros((480, 640), np.uint8)
    mask[:, :400] = 255
    (scene / "mask_visib").mkdir()
    Image.fromarray(mask).save(scene / "mask_visib" / "000001_000001.png")
    return tmp_path


def load_bop(folder, **options):
    return load_data(
        "pose-bop", root=folder, options={"object": 3, **options}, validation=0.0, test=0.34
    )


def test_a_folder_in_the_form_of_bop_is_read(bop, mesh):
    data = load_bop(bop)
    assert data.classes == ("obj_000003",)
    assert (len(data.train), len(data.test)) == (2, 1)  # one is hardly seen
    truth = unpack(torch.cat([data.train.labels, data.test.labels]))
    wanted = [draw_scene(SceneSettings(), mesh, "train", n, 16).pose for n in range(3)]
    for number in range(3):
        own = truth.pose(number)
        assert min(np.abs(own.rotation - pose.rotation).max() for pose in wanted) < 1e-6
        assert min(np.abs(own.translation - pose.translation).max() for pose in wanted) < 1e-6
    inside = codes(truth, 5).inside
    assert inside.all()  # the crop is around the box
    assert truth.masks[:, 1].flatten(1).any(dim=1).all()
    assert load_bop(bop, seen=0.0).train.labels.shape[0] == 3
    everything = load_bop(bop, test_split="train_pbr")
    assert (len(everything.train), len(everything.test)) == (3, 3)


def change(bop, name, edit):
    file = bop / "train_pbr" / "000000" / f"scene_{name}.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_a_camera_without_intrinsics_is_refused(bop):
    change(bop, "camera", lambda content: content["1"].pop("cam_K"))
    with pytest.raises(DataError, match="picture 1: its camera has no intrinsics"):
        load_bop(bop)
    change(bop, "camera", lambda content: content.pop("1"))
    with pytest.raises(DataError, match="its camera has no intrinsics"):
        load_bop(bop)
    change(bop, "camera", lambda content: content.update({"1": {"cam_K": [0] * 9}}))
    with pytest.raises(DataError, match="with focal lengths above 0"):
        load_bop(bop)


def test_other_folders_of_bop_are_refused(bop):
    change(bop, "gt", lambda content: content["0"][1].update(cam_R_m2c=[1] * 9))
    with pytest.raises(DataError, match="picture 0: its cam_R_m2c is no rotation"):
        load_bop(bop)
    change(bop, "gt", lambda content: content["0"][1].update(cam_R_m2c=[1]))
    with pytest.raises(DataError, match="needs cam_R_m2c of nine numbers"):
        load_bop(bop)
    with pytest.raises(DataError, match="train_real: is not there"):
        load_bop(bop, split="train_real")
    with pytest.raises(DataError, match=r"obj_000009.ply"):
        load_bop(bop, object=9)
    with pytest.raises(UsageError, match="object is a number from 0"):
        load_bop(bop, seen=2.0)
    with pytest.raises(UsageError, match=r"give data.root"):
        load_data("pose-bop")
    (bop / "train_pbr" / "000000" / "rgb" / "000002.png").unlink()
    change(bop, "gt", lambda content: content.pop("0"))
    with pytest.raises(DataError, match="has no picture 000002 in rgb or gray"):
        load_bop(bop)
    (bop / "train_pbr" / "000000" / "scene_gt.json").write_text("[]")
    with pytest.raises(DataError, match="has no entries by the numbers of pictures"):
        load_bop(bop)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"pictures": 2}}, "pictures is 10 to 1,000,000, got 2"),
        ({"options": {"jitter": 0.9}}, "jitter is out of range, got 0.9"),
        ({"options": {"shape": -1}}, "shape and seed are whole numbers"),
        ({"root": "x"}, "is generated and does not use data.root"),
        ({"image_size": 64}, "has crops of 128×128 pixels"),
        ({"options": {"mesh": "none.ply"}}, None),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    if words is None:
        pytest.importorskip("trimesh")
        with pytest.raises(DataError, match=r"none.ply: trimesh can't read it"):
            load_data("pose-objects", **settings)
    else:
        with pytest.raises(UsageError, match=words):
            load_data("pose-objects", **settings)
