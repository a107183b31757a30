"""Files of stereo data that are odd, truncated or wrong: maps, disparities, cameras, layouts."""

import numpy as np
import pytest
import torch
from PIL import Image

import smallfry
from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.stereo.files import (
    read_calibration,
    read_disparity,
    read_labels,
    read_pfm,
)
from smallfry.kits.stereo.truth import unpack
from smallfry_runtime.pairs import read_view

VALUES = np.random.default_rng(0).uniform(1, 30, (3, 5)).astype(np.float32)


def pfm(head, values=VALUES, order="<"):
    return head + values[::-1].astype(f"{order}f4").tobytes()


def save(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file)
    return file


@pytest.mark.parametrize(
    ("head", "order"),
    [
        (b"Pf\n5 3\n-1.0\n", "<"),
        (b"Pf 5 3 -1\n", "<"),
        (b"Pf\r\n5 3\r\n-1.0\r\n", "<"),  # as some programs of Windows end lines
        (b"Pf\n5\n3\n0.0039215689\n", ">"),
        (b"Pf\n5 3\n-3.9e-3\n", "<"),  # the scale's size is a unit that nobody uses
        (b"Pf\n5 3\n1e+00\n", ">"),
    ],
)
def test_heads_of_float_maps_are_read_in_all_their_forms(tmp_path, head, order):
    file = tmp_path / "a.pfm"
    file.write_bytes(pfm(head, order=order))
    found = read_pfm(file)
    assert found.dtype == np.float64
    assert np.array_equal(found, VALUES)


@pytest.mark.parametrize("cut", [1, 4, 59, 60])
def test_a_truncated_float_map_is_refused_wherever_it_ends(tmp_path, cut):
    file = tmp_path / "a.pfm"
    file.write_bytes(pfm(b"Pf\n5 3\n-1.0\n")[:-cut])
    with pytest.raises(DataError, match=r"a\.pfm: has not the 3×5 values of its header"):
        read_pfm(file)


def test_a_float_map_with_more_than_its_values_is_refused(tmp_path):
    file = tmp_path / "a.pfm"
    file.write_bytes(pfm(b"Pf\n5 3\n-1.0\n") + b"\0\0\0\0")
    with pytest.raises(DataError, match="has not the 3×5 values"):
        read_pfm(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "isn't a grey PFM, which begins with Pf"),
        (pfm(b"PF\n5 3\n-1.0\n"), "isn't a grey PFM"),  # in colour
        (pfm(b"Pf\n-5 3\n-1.0\n"), "isn't a grey PFM"),
        (pfm(b"Pf\n5 3\ninf\n"), "isn't a grey PFM"),
        (pfm(b"Pf\n5000000 3\n-1.0\n"), "isn't a grey PFM"),
        (b"Pf\n0 3\n-1.0\n", "has not the 3×0 values"),
        (b"Pf\n999999 999999\n-1.0\n", "has not the 999999×999999 values"),
        (pfm(b"Pf\n5 3\n1e\n"), "its scale isn't a number"),
    ],
)
def test_heads_of_other_files_are_refused(tmp_path, content, words):
    file = tmp_path / "a.pfm"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_pfm(file)


@pytest.mark.parametrize("suffix", [".pfm", ".PFM"])
def test_what_is_no_positive_number_is_an_unknown_disparity(tmp_path, suffix):
    values = np.array([[np.inf, np.nan, -np.inf, -2.0, 0.0, 2.5]], np.float32)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(pfm(b"Pf\n6 1\n-1.0\n", values))
    assert read_disparity(file).tolist() == [[0, 0, 0, 0, 0, 2.5]]


def test_disparities_of_16_bits_keep_every_step_of_1_in_256(tmp_path):
    stored = np.array([[0, 1, 255, 256, 257], [32767, 32768, 65534, 65535, 300]], np.uint16)
    found = read_disparity(save(tmp_path / "a.png", stored))
    assert np.array_equal(found * 256, stored)
    assert found[1, 3] == 65535 / 256


@pytest.mark.parametrize(
    "values",
    [
        np.full((4, 6), 200, np.uint8),
        np.arange(24).reshape(4, 6) % 2 == 0,  # one bit a pixel
    ],
)
def test_disparities_of_few_bits_are_refused(tmp_path, values):
    with pytest.raises(DataError, match="PNGs of 16 bits with 256 × disparity, and this has 8"):
        read_disparity(save(tmp_path / "a.png", values))


@pytest.mark.parametrize("name", ["a.png", "a.pfm"])
def test_missing_and_cut_files_of_truth_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}: "):
        read_disparity(tmp_path / name)
    whole = save(tmp_path / "whole.png", np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    (tmp_path / name).write_bytes(whole.read_bytes()[:90])
    with pytest.raises(DataError, match=rf"{name}: "):
        read_disparity(tmp_path / name)


def test_numbers_of_classes_are_those_of_palettes_too(tmp_path):
    numbers = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)
    coloured = Image.fromarray(numbers)
    coloured.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    coloured.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
    assert read_labels(tmp_path / "a.png", 3).tolist() == [[0, 1, 2], [-1, 2, 1]]
    assert read_labels(tmp_path / "a.png", 0).max() == 2  # without a list of classes
    with pytest.raises(DataError, match="has class 2, and there are 2 classes, from 0; 255 is for"):
        read_labels(tmp_path / "a.png", 2)


def test_a_mask_without_any_class_is_read(tmp_path):
    file = save(tmp_path / "a.png", np.full((2, 3), 255, np.uint8))
    assert read_labels(file, 1).tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_views_of_any_mode_have_three_channels_in_their_own_size(tmp_path, mode):
    Image.new("RGB", (7, 4), (255, 255, 255)).convert(mode).save(tmp_path / "a.png")
    found = read_view(tmp_path / "a.png")
    assert found.shape == (3, 4, 7)
    assert (found == 255).all()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cam0=[100 0 50; 0 100 40; 0 0 1]\nbaseline=200\n", (20.0, 0.0)),
        ("doffs = -3.5\nbaseline = 200.5\ncam0 = [100.5 0 1; 0 100.5 2; 0 0 1]", (20.15025, -3.5)),
        ("cam0=[1e2 0 50; 0 100 40; 0 0 1]\r\nbaseline=2e2\r\ndoffs=0\r\nndisp=64\r\n", (20, 0)),
        ("cam0=[100; 0]\ncam1=[7 0 0]\nbaseline=10", (1.0, 0.0)),
    ],
)
def test_cameras_of_middlebury_are_read(tmp_path, text, wanted):
    (tmp_path / "calib.txt").write_bytes(text.encode())
    assert read_calibration(tmp_path / "calib.txt") == pytest.approx(wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "baseline=200",
        "cam0=[100 0 50; 0 100 40; 0 0 1]",
        "cam0=[]\nbaseline=200",
        "cam0=[far 0 1]\nbaseline=200",
        "cam0=[100 0 1]\nbaseline=wide",
        "cam0=[100 0 1]\nbaseline=200\ndoffs=none",
        "cam0=[100 0 1]\nbaseline=0",
        "cam0=[-100 0 1]\nbaseline=-200",
        "cam0=[nan 0 1]\nbaseline=200",
        "cam0=[100 0 1]\nbaseline=inf",
        "cam0=[100 0 1]\nbaseline=200\ndoffs=nan",
    ],
)
def test_cameras_without_a_length_are_refused(tmp_path, text):
    (tmp_path / "calib.txt").write_text(text)
    with pytest.raises(DataError, match=r"calib\.txt: needs lines cam0=.*both above 0"):
        read_calibration(tmp_path / "calib.txt")


def test_a_missing_calibration_is_named(tmp_path):
    with pytest.raises(DataError, match=r"calib\.txt: can't be read"):
        read_calibration(tmp_path / "calib.txt")


SIZE = (32, 64)
VIEW = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)
TRUTH = np.full(SIZE, 3 * 256, np.uint16)


def pair(folder, stem, suffix=".png", labels=None, truth=TRUTH):
    save(folder / "left" / f"{stem}{suffix}", VIEW)
    save(folder / "right" / f"{stem}{suffix}", VIEW[::-1])
    save(folder / "disparity" / f"{stem}.png", truth)
    if labels is not None:
        save(folder / "labels" / f"{stem}.png", np.full(SIZE, labels, np.uint8))


def load(folder, name="stereo-folder", **settings):
    return load_data(name, root=folder, **{"validation": 0.0, "test": 0.0, **settings})


def test_classes_in_another_encoding_are_refused(tmp_path):
    pair(tmp_path, "a")
    (tmp_path / "classes.txt").write_bytes("Straße\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt: can't be read as UTF-8 text"):
        load(tmp_path)
    (tmp_path / "classes.txt").write_bytes("Straße\r\n\r\nBaum \r\n".encode("utf-8-sig"))
    assert load(tmp_path).classes == ("Straße", "Baum")


def test_an_empty_list_of_classes_is_refused(tmp_path):
    pair(tmp_path, "a")
    (tmp_path / "classes.txt").write_text("\n \n")
    with pytest.raises(DataError, match="expected one class name per line, each once"):
        load(tmp_path)


def test_pairs_without_labels_have_no_known_class_and_equal_weights(tmp_path):
    pair(tmp_path, "a", labels=1)
    pair(tmp_path, "b")
    data = load(tmp_path)
    truth = unpack(data.train.labels)
    assert data.classes == ("class 0", "class 1")
    assert [row.unique().tolist() for row in truth.labels] == [[1], [-1]]
    for stem in ("a", "b"):
        save(tmp_path / "labels" / f"{stem}.png", np.full(SIZE, 255, np.uint8))
    assert load(tmp_path).classes == ("class 0",)
    assert unpack(load(tmp_path).train.labels).labels.unique().tolist() == [-1]


def test_views_may_be_of_several_kinds_of_files(tmp_path):
    pair(tmp_path, "b", ".jpg")
    pair(tmp_path, "a", ".ppm")
    (tmp_path / "left" / "notes.txt").write_text("no picture")
    data = load(tmp_path)
    assert [data.locate("train", i).rsplit("/", 1)[1] for i in range(2)] == ["a.ppm", "b.jpg"]
    assert np.array_equal(data.train.images[0, :3].numpy(), VIEW.transpose(2, 0, 1))


def test_two_views_of_one_name_are_refused(tmp_path):
    pair(tmp_path, "a")
    save(tmp_path / "left" / "a.jpg", VIEW)
    with pytest.raises(DataError, match=r"left: a\.jpg and a\.png are of one name: remove one"):
        load(tmp_path)


def test_views_of_unequal_size_are_refused(tmp_path):
    pair(tmp_path, "a")
    save(tmp_path / "right" / "a.png", VIEW[:, :-1])
    words = (
        r"right/a.png: is 32×63 pixels, and .*left/a.png is 32×64: both views .* one size: rectify"
    )
    with pytest.raises(DataError, match=words):
        load(tmp_path)


def test_a_single_pair_is_for_training_whatever_is_held_out(tmp_path):
    pair(tmp_path, "a")
    data = load(tmp_path, test=0.9, validation=0.9)
    assert [len(each) for each in (data.train, data.validation, data.test)] == [1, 0, 0]


def test_a_single_pair_is_too_few_to_train_on(tmp_path):
    pair(tmp_path / "pairs", "a")
    data = {"name": "stereo-folder", "root": str(tmp_path / "pairs")}
    words = r"too few images to train on \(1\): two are the least; add some"
    with pytest.raises(DataError, match=words):
        smallfry.train(task="stereo", data=data, run=tmp_path / "run", progress="quiet")


@pytest.mark.parametrize("seed", range(3))
def test_every_pair_is_in_one_split_alone(tmp_path, seed):
    for number in range(7):
        pair(tmp_path, str(number), truth=np.full(SIZE, 256 * (number + 1), np.uint16))
    data = load(tmp_path, test=0.3, validation=0.2, split_seed=seed)
    parts = [data.train, data.validation, data.test]
    found = [unpack(each.labels).disparity[:, 0, 0].tolist() for each in parts]
    assert [len(each) for each in found] == [4, 1, 2]
    assert sorted(found[0] + found[1] + found[2]) == [1, 2, 3, 4, 5, 6, 7]
    assert len(load(tmp_path, limit=2).train) == 2


def blocks(values, factor):
    """Cut values (…, height, width) into blocks, row by row."""
    height, width = (side // factor for side in values.shape[-2:])
    for i in range(height):
        for j in range(width):
            yield (
                i,
                j,
                values[..., factor * i : factor * (i + 1), factor * j : factor * (j + 1)],
            )


def test_a_reduced_pair_is_that_of_a_loop_over_blocks(tmp_path):
    random, factor = np.random.default_rng(3), 3
    shape = (32 * factor + 2, 64 * factor + 1)  # the rest is cut off
    truth = random.integers(1, 2000, shape).astype(np.uint16) * (random.random(shape) < 0.5)
    view = random.integers(0, 256, (*shape, 3), np.uint8)
    seen = truth * (random.random(shape) < 0.6)
    for name, values in (("image_2", view), ("image_3", view[:, ::-1])):
        save(tmp_path / name / "0_10.png", values)
    save(tmp_path / "disp_occ_0" / "0_10.png", truth.astype(np.uint16))
    save(tmp_path / "disp_noc_0" / "0_10.png", seen.astype(np.uint16))
    settings = {"reduce": factor, "focal": 600.0, "baseline": 0.5}
    data = load(tmp_path, "stereo-kitti", options=settings)
    found = unpack(data.train.labels)
    assert data.input_shape == (6, 32, 64)
    assert found.scale.item() == pytest.approx(100.0)
    for i, j, block in blocks(truth / 256, factor):
        known = block[block > 0]
        wanted = known.mean() / factor if 2 * len(known) >= factor**2 else 0
        assert found.disparity[0, i, j].item() == pytest.approx(wanted, rel=1e-6)
    for i, j, block in blocks((truth > 0) & (seen == 0), factor):
        hidden = 2 * block.sum() > factor**2 and bool(found.known[0, i, j])
        assert bool(found.hidden[0, i, j]) == hidden
    pixels = data.train.images[0, :3].numpy()
    for i, j, block in blocks(view.transpose(2, 0, 1).astype(float), factor):
        assert np.abs(pixels[:, i, j] - block.mean((1, 2))).max() <= 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduce": 65}, "reduce is 1 to 64, got 65"),
        ({"baseline": 0.5}, "are both above 0, or both left out, got 0 and 0.5"),
        ({"focal": -1.0, "baseline": -1.0}, "focal and baseline are both above 0"),
        ({"kappa": 1.0}, "kappa is above 1, got 1.0"),
        ({"kappa": float("nan")}, "kappa is above 1, got nan"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, options, words):
    pair(tmp_path, "a", labels=0)
    with pytest.raises(UsageError, match=words):
        load(tmp_path, options=options)


def test_disparities_of_points_seen_by_both_need_the_views_size(tmp_path):
    for name in ("colored_0", "colored_1"):
        save(tmp_path / name / "0_10.png", VIEW)
    save(tmp_path / "disp_occ" / "0_10.png", TRUTH)
    save(tmp_path / "disp_noc" / "0_10.png", TRUTH[:-1])
    with pytest.raises(DataError, match=r"disp_noc/0_10.png: is 31×64 pixels"):
        load(tmp_path, "stereo-kitti")
    (tmp_path / "disp_noc" / "0_10.png").unlink()
    assert not unpack(load(tmp_path, "stereo-kitti").train.labels).hidden.any()


def middlebury(folder):
    save(folder / "im0.png", VIEW)
    save(folder / "im1.png", VIEW)
    (folder / "disp0.pfm").write_bytes(pfm(b"Pf\n64 32\n-1\n", np.full(SIZE, 4, np.float32)))
    (folder / "calib.txt").write_text("cam0=[100 0 1; 0 100 1; 0 0 1]\nbaseline=500\ndoffs=2\n")


def test_a_scene_of_middlebury_may_be_the_folder_itself(tmp_path):
    middlebury(tmp_path)
    truth = unpack(load(tmp_path, "stereo-middlebury").train.labels)
    assert (truth.scale.item(), truth.offset.item()) == (50.0, 2.0)
    assert (truth.disparity == 4).all()
    assert not truth.hidden.any()
    (tmp_path / "disp0.pfm").unlink()
    (tmp_path / "calib.txt").unlink()
    with pytest.raises(DataError, match=r"lacks disp0\.pfm and calib\.txt of a scene"):
        load(tmp_path, "stereo-middlebury")


def test_folders_beside_scenes_are_left_alone(tmp_path):
    (tmp_path / "Scene").mkdir()
    middlebury(tmp_path / "Scene")
    (tmp_path / "papers").mkdir()
    (tmp_path / "readme.txt").write_text("no scene")
    data = load(tmp_path, "stereo-middlebury", options={"reduce": 1})
    assert data.locate("train", 0).endswith("Scene/im0.png")
    save(tmp_path / "Scene" / "mask0nocc.png", np.full((31, 64), 255, np.uint8))
    with pytest.raises(DataError, match=r"mask0nocc.png: is 31×64 pixels"):
        load(tmp_path, "stereo-middlebury")


def test_the_truth_of_a_smaller_size_keeps_what_is_hidden_and_unknown(tmp_path):
    truth = TRUTH.copy()
    truth[:, :20] = 0
    pair(tmp_path, "a", truth=truth)
    found = unpack(load(tmp_path, image_size=(32, 32)).train.labels)
    assert torch.equal(found.known[0], torch.arange(16, 48).expand(32, 32) >= 20)
