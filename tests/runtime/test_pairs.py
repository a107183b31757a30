"""Pairs of views as inputs: files two by two, folders in every layout, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smallfry_runtime.frames import Frame
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.pairs import find_pairs, fitted, pair_up, takes_pairs, with_sizes

FRAME = Frame(4, 6)
VIEWS = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), np.uint8)
WANTED = np.concatenate([view.transpose(2, 0, 1)[:, :4] for view in VIEWS])


def save(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file)
    return str(file)


def find(*inputs):
    return [*find_pairs([*map(str, inputs)], io.BytesIO(), FRAME)]


def pixels(image):
    assert image.error is None
    return np.load(io.BytesIO(image.encoded), allow_pickle=False)


def test_pairs_are_inputs_of_stereo_models_alone():
    assert takes_pairs("stereo")
    assert not any(map(takes_pairs, ("pose", "ocr", "puzzle", "a task of one's own")))


def test_pictures_two_by_two_are_a_pair_and_arrays_pass(tmp_path):
    left, right = (save(tmp_path / f"{n}.png", view) for n, view in zip("ab", VIEWS, strict=True))
    np.save(tmp_path / "a.npy", WANTED)
    one, array, other = find(left, right, tmp_path / "a.npy", left, right)
    for pair in (one, other):
        assert pair.name == f"{left}, {right}"
        assert np.array_equal(pixels(pair), WANTED)
    assert array.encoded == tmp_path / "a.npy"
    encoded = [InputImage(n, Path(f).read_bytes()) for n, f in (("l", left), ("r", right))]
    for images in (encoded, [encoded[0], one, encoded[1]]):  # an array in between stays
        pair = [*pair_up(images, FRAME)][-1]
        assert pair.name == "l, r"
        assert np.array_equal(pixels(pair), WANTED)
    for empty in ([encoded[0], InputImage("r", b"")], [InputImage("r", b""), encoded[0]]):
        (refused,) = pair_up(empty, FRAME)
        assert "r: " in refused.error
    (pair,) = find(tmp_path / "?.png")
    assert np.array_equal(pixels(pair), WANTED)


@pytest.mark.parametrize(
    ("frame", "inner"),
    [((4, 6), (4, 6)), ((8, 6), (5, 6)), ((4, 16), (4, 6)), ((8, 16), (5, 6))],  # views are 5 × 6
)
def test_pairs_have_their_own_size_in_the_frame(frame, inner, tmp_path):
    files = [save(tmp_path / f"{n}.png", view) for n, view in zip("ab", VIEWS, strict=True)]
    (pair,) = find_pairs(files, io.BytesIO(), Frame(*frame))
    assert pair.inner == inner
    assert pixels(pair).shape == (6, *frame)
    assert not pixels(pair)[:, inner[0] :].any()
    assert not pixels(pair)[..., inner[1] :].any()


def test_settings_have_the_sizes_of_pairs_alone():
    assert with_sizes("ocr", None, [None], FRAME) is None
    assert with_sizes("stereo", None, [(2, 3), None], FRAME) == {"sizes": [(2, 3), (4, 6)]}
    given = {"exit": 1, "sizes": [[1, 1]]}
    assert with_sizes("stereo", given, [(2, 3)], FRAME) == given


@pytest.mark.parametrize("names", [("left", "right"), ("image_2", "image_3")])
def test_folders_have_pairs_by_name(names, tmp_path):
    for stem in ("0", "1"):
        for name, view in zip(names, VIEWS, strict=True):
            save(tmp_path / name / f"{stem}.png", view)
    for image in find(tmp_path):
        assert np.array_equal(pixels(image), WANTED)
    save(tmp_path / names[0] / "2.jpg", VIEWS[0])
    *_, alone = found = find(tmp_path)
    assert len(found) == 3
    assert "2.jpg: without the other view" in alone.error
    save(tmp_path / names[1] / "0.jpg", VIEWS[0])
    (error,) = find(tmp_path)
    assert "of one name" in error.error


def test_a_scene_of_middlebury_is_a_pair(tmp_path):
    for name, view in zip(("im0.png", "im1.png"), VIEWS, strict=True):
        save(tmp_path / name, view)
    (pair,) = find(tmp_path)
    assert np.array_equal(pixels(pair), WANTED)


def test_what_is_no_pair_is_refused(tmp_path):
    left, small = save(tmp_path / "a.png", VIEWS[0]), save(tmp_path / "b.png", VIEWS[1, :3])
    text = tmp_path / "c.png"
    text.write_text("no picture")
    for inputs, message in [
        ([left], "a left view without its right one; give pictures two by two, or a folder"),
        ([left, small], "views of 5×6 and 3×6; expected two of one size"),
        ([left, text], "c.png: not an image"),
        ([tmp_path], "has no pairs; expected the folders left and right, or"),
        ([tmp_path / "none.png"], "there is no such file"),
    ]:
        (image,) = find(*inputs)
        assert message in image.error


@pytest.mark.parametrize("size", [(2, 3), (7, 9), (2, 9), (5, 6)])
def test_maps_are_cut_in_the_middle_and_filled_up(size):
    values = np.arange(1, 31).reshape(1, 5, 6)
    found = fitted(values, *size, empty=0)
    assert found.shape == (1, *size)
    top, start = max(0, (5 - size[0]) // 2), max(0, (6 - size[1]) // 2)
    kept = values[:, top : top + size[0], start : start + size[1]]
    assert np.array_equal(found[:, : kept.shape[1], : kept.shape[2]], kept)
    assert found.sum() == kept.sum()
