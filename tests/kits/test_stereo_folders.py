"""Folders of pairs: a plain one, KITTI's and Middlebury's, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.stereo.files import read_calibration, read_disparity, read_labels, read_pfm
from smallfry.kits.stereo.truth import unpack

HEIGHT, WIDTH = 40, 70
RANDOM = np.random.default_rng(0)
VIEWS = RANDOM.integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8)
DISPARITY = np.round(RANDOM.uniform(1, 20, (HEIGHT, WIDTH)) * 256) / 256
DISPARITY[:5] = 0
LABELS = RANDOM.integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)
LABELS[0] = 255


def save(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file)


def save_disparity(file, values):
    save(file, np.rint(values * 256).astype(np.uint16))


def write_pfm(file, values, order="<"):
    head = f"Pf\n{values.shape[1]} {values.shape[0]}\n{'-' if order == '<' else ''}1.0\n"
    file.write_bytes(head.encode() + values[::-1].astype(f"{order}f4").tobytes())


@pytest.fixture
def plain(tmp_path):
    for number in range(4):
        save(tmp_path / "left" / f"{number}.png", VIEWS[0])
        save(tmp_path / "right" / f"{number}.png", VIEWS[1])
        save_disparity(tmp_path / "disparity" / f"{number}.png", DISPARITY)
        save(tmp_path / "labels" / f"{number}.png", LABELS)
    return tmp_path


def load(name, folder, **settings):
    return load_data(name, root=folder, **{"validation": 0.0, "test": 0.25, **settings})


def test_a_plain_folder_is_filled_up_to_multiples_of_32(plain):
    (plain / "classes.txt").write_text("road\ncar\ntree\n")
    data = load("stereo-folder", plain)
    assert data.input_shape == (6, 64, 96)
    assert data.classes == ("road", "car", "tree")
    assert (len(data.train), len(data.test)) == (3, 1)
    image, truth = data.train.images[0], unpack(data.train.labels)
    assert np.array_equal(image[:3, :HEIGHT, :WIDTH].numpy(), VIEWS[0].transpose(2, 0, 1))
    assert np.array_equal(image[3:, :HEIGHT, :WIDTH].numpy(), VIEWS[1].transpose(2, 0, 1))
    assert not image[:, HEIGHT:].any()
    assert not truth.known[:, HEIGHT:].any()
    assert np.allclose(truth.disparity[0, :HEIGHT, :WIDTH], DISPARITY, atol=1e-5)
    assert not truth.known[0, :5].any()
    assert (truth.labels[0, 0] == -1).all()
    assert np.array_equal(truth.labels[0, 1:HEIGHT, :WIDTH], LABELS[1:])
    assert torch.allclose(truth.weights.sum(dim=1), torch.tensor(3.0))
    assert data.locate("train", 0).endswith(".png")


def test_a_smaller_size_is_cut_from_the_middle(plain):
    data = load("stereo-folder", plain, image_size=(32, 64))
    truth = unpack(data.train.labels)
    assert np.allclose(truth.disparity[0], DISPARITY[4:36, 3:67], atol=1e-5)
    assert np.array_equal(data.train.images[0, :3].numpy(), VIEWS[0, 4:36, 3:67].transpose(2, 0, 1))


def test_pairs_are_reduced_with_their_disparities(tmp_path):
    left = np.repeat(np.repeat(VIEWS[0, :32, :64], 2, axis=0), 2, axis=1)
    save(tmp_path / "left" / "a.png", left)
    save(tmp_path / "right" / "a.png", left)
    save_disparity(tmp_path / "disparity" / "a.png", np.full((64, 128), 12.0))
    data = load("stereo-folder", tmp_path, options={"reduce": 2}, test=0.0)
    assert data.input_shape == (6, 32, 64)
    assert np.array_equal(data.train.images[0, 3:].numpy(), VIEWS[0, :32, :64].transpose(2, 0, 1))
    assert (unpack(data.train.labels).disparity == 6).all()
    assert data.classes == ("class 0",)
    with pytest.raises(UsageError, match="reduce 8 leaves less than 32 pixels"):
        load("stereo-folder", tmp_path, options={"reduce": 8})


def test_kittis_layout_has_occlusions(tmp_path):
    base = tmp_path / "training"
    both = np.where(np.arange(WIDTH) < 30, 0.0, DISPARITY)
    for name, values in (("image_2", VIEWS[0]), ("image_3", VIEWS[1])):
        save(base / name / "000000_10.png", values)
        save(base / name / "000000_11.png", values)  # without truth
    save_disparity(base / "disp_occ_0" / "000000_10.png", DISPARITY)
    save_disparity(base / "disp_noc_0" / "000000_10.png", both)
    save(base / "semantic" / "000000_10.png", LABELS)
    data = load("stereo-kitti", tmp_path, test=0.0, options={"focal": 721.5, "baseline": 0.54})
    truth = unpack(data.train.labels)
    assert len(data.train) == 1
    assert truth.hidden[0, 5:HEIGHT, :30].all()
    assert not truth.hidden[0, :, 30:].any()
    assert np.allclose(truth.disparity[0, 5:HEIGHT, :30], DISPARITY[5:, :30], atol=1e-5)
    assert truth.scale.item() == pytest.approx(721.5 * 0.54)
    assert len(data.classes) == 3


def test_the_layout_of_2012_is_known(tmp_path):
    for name, values in (("colored_0", VIEWS[0]), ("colored_1", VIEWS[1])):
        save(tmp_path / name / "000000_10.png", values)
    save_disparity(tmp_path / "disp_occ" / "000000_10.png", DISPARITY)
    data = load("stereo-kitti", tmp_path, test=0.0)
    assert not unpack(data.train.labels).hidden.any()
    (tmp_path / "colored_1" / "000000_10.png").unlink()
    with pytest.raises(DataError, match=r"000000_10.png: has no file of that name in .*colored_1"):
        load("stereo-kitti", tmp_path, test=0.0)


def scene(folder):
    folder.mkdir()
    save(folder / "im0.png", VIEWS[0])
    save(folder / "im1.png", VIEWS[1])
    write_pfm(folder / "disp0.pfm", np.where(DISPARITY > 0, DISPARITY, np.inf))
    seen = np.where(np.arange(WIDTH) < 20, 128, 255).astype(np.uint8)
    save(folder / "mask0nocc.png", np.broadcast_to(seen, (HEIGHT, WIDTH)).copy())
    (folder / "calib.txt").write_text(
        "cam0=[3997.684 0 1176.728; 0 3997.684 1011.728; 0 0 1]\ndoffs=131.111\nbaseline=193.001\n"
    )


def test_middleburys_layout_has_cameras(tmp_path):
    for name in ("Adirondack", "Piano"):
        scene(tmp_path / name)
    data = load("stereo-middlebury", tmp_path, test=0.5)
    truth = unpack(data.train.labels)
    assert (len(data.train), len(data.test)) == (1, 1)
    assert np.allclose(truth.disparity[0, :HEIGHT, :WIDTH], DISPARITY, atol=1e-5)
    assert truth.hidden[0, 5:HEIGHT, :20].all()
    assert not truth.hidden[0, :, 20:].any()
    assert truth.scale.item() == pytest.approx(3997.684 * 0.193001)
    assert truth.offset.item() == pytest.approx(131.111, rel=1e-6)
    (tmp_path / "Piano" / "im1.png").unlink()
    with pytest.raises(DataError, match=r"Piano: lacks im1.png"):
        load("stereo-middlebury", tmp_path)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_portable_float_map_is_read_from_the_top(tmp_path, order):
    write_pfm(tmp_path / "a.pfm", DISPARITY, order)
    assert np.array_equal(read_pfm(tmp_path / "a.pfm"), DISPARITY.astype(np.float32))
    write_pfm(tmp_path / "b.pfm", np.array([[1.0, np.inf], [np.nan, -1]]))
    assert read_disparity(tmp_path / "b.pfm").tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"P5\n2 2\n255\n0000", "isn't a grey PFM"),
        (b"Pf\n2 2\n-1.0\n0000", "has not the 2×2 values of its header"),
        (b"Pf\n2 2\n1.e.\n" + bytes(16), "its scale isn't a number"),
    ],
)
def test_damaged_float_maps_are_refused(tmp_path, content, words):
    (tmp_path / "a.pfm").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_pfm(tmp_path / "a.pfm")
    with pytest.raises(DataError, match="can't be read"):
        read_pfm(tmp_path / "none.pfm")


def test_wrong_files_of_truth_are_refused(tmp_path):
    save(tmp_path / "grey.png", LABELS)
    save(tmp_path / "colour.png", VIEWS[0])
    with pytest.raises(DataError, match="and this has 8 bits"):
        read_disparity(tmp_path / "grey.png")
    with pytest.raises(DataError, match="has colours, and one number per pixel is needed"):
        read_labels(tmp_path / "colour.png", 3)
    with pytest.raises(DataError, match="has class 2, and there are 2 classes"):
        read_labels(tmp_path / "grey.png", 2)
    (tmp_path / "calib.txt").write_text("cam0=none\n")
    with pytest.raises(DataError, match=r"needs lines cam0=\[f 0 cx"):
        read_calibration(tmp_path / "calib.txt")


@pytest.mark.parametrize("part", ["right", "disparity", "labels"])
def test_unequal_sizes_are_refused(plain, part):
    file = plain / part / "2.png"
    with Image.open(file) as image:
        smaller = np.asarray(image)[:-3]
    save(file, smaller)
    with pytest.raises(
        DataError, match=rf"{part}/2.png: is 37×70 pixels, and .*left/2.png is 40×70"
    ):
        load("stereo-folder", plain)


def test_lacking_and_surplus_files_are_named(plain):
    (plain / "right" / "1.png").unlink()
    with pytest.raises(DataError, match=r"left/1.png: has no file of that name in .*right: add it"):
        load("stereo-folder", plain)
    save(plain / "right" / "1.png", VIEWS[1])
    save(plain / "right" / "9.png", VIEWS[1])
    with pytest.raises(DataError, match=r"right/9.png: has no file of that name in .*left: add it"):
        load("stereo-folder", plain)


def test_folders_of_another_form_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"needs the folder of the pairs: give data.root"):
        load_data("stereo-folder")
    with pytest.raises(DataError, match="left: is not there"):
        load("stereo-folder", tmp_path)
    with pytest.raises(DataError, match="has no pairs in the layout of stereo-kitti"):
        load("stereo-kitti", tmp_path)
    with pytest.raises(DataError, match="has no pairs in the layout of stereo-middlebury"):
        load("stereo-middlebury", tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"reduce": 0}}, "reduce is 1 to 64, got 0"),
        ({"options": {"focal": 3.0}}, "focal and baseline are both above 0"),
        ({"image_size": (40, 64)}, "has multiples of 32, not 40 64"),
    ],
)
def test_wrong_settings_of_folders_are_refused(plain, settings, words):
    with pytest.raises(UsageError, match=words):
        load("stereo-folder", plain, **settings)


def test_names_of_classes_are_given_once(plain):
    (plain / "classes.txt").write_text("road\nroad\n")
    with pytest.raises(DataError, match="expected one class name per line, each once"):
        load("stereo-folder", plain)
