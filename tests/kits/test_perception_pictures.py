"""Pictures of the kits of perception, read back: what is shown, in which order, and of nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from smallfry.data import Split
from smallfry.kits.ocr.pictures import draw_confusion, draw_texts
from smallfry.kits.places.modules import ModularSNN, Settings
from smallfry.kits.places.pictures import draw_activity, draw_fields, draw_recalls, draw_scores
from smallfry.kits.pose.models import PoseCodes
from smallfry.kits.pose.pictures import draw_keypoints, draw_poses
from smallfry.kits.pose.scenes import CAMERA
from smallfry.kits.pose.truth import codes, pack, unpack
from smallfry.kits.stereo.models import FirstExit
from smallfry.kits.stereo.pictures import draw_pairs
from smallfry.kits.stereo.truth import pack as pack_pair
from smallfry.kits.stereo.truth import unpack as unpack_pair
from smallfry.kits.uav.pictures import MASK, draw_masks
from smallfry_runtime.pnp import Pose, project

# what no axis, line, text or colour map of a picture has
SOLID = ((255, 0, 255), (0, 255, 255), (255, 255, 0), (0, 128, 255), (128, 0, 64), (1, 99, 1))


def pixels_of(file):
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def share_of(picture, colour, near=2):
    """Where a colour is: a mask of the picture."""
    return (np.abs(picture - np.array(colour)).max(axis=-1) <= near).astype(bool)


def middle_row(picture, colour):
    return np.nonzero(share_of(picture, colour))[0].mean()


def solid(count, channels, *size):
    colours = torch.tensor(SOLID[:count], dtype=torch.uint8).repeat(1, channels // 3)
    return colours[:, :, None, None].expand(count, channels, *size).contiguous()


@pytest.fixture(scope="module")
def pairs():
    known, none = np.full((32, 64), 16.0), np.zeros((32, 64), bool)
    rows = [pack_pair(known, none, none.astype(int), 2)] * 5
    rows.append(pack_pair(0 * known, none, none.astype(int) - 1, 2))  # nothing is known of the last
    return Split(solid(6, 6, 32, 64), torch.arange(6), torch.from_numpy(np.stack(rows)))


def exits(count, errors):
    found = torch.tensor([1 + error / 16 for error in errors])[:, None, None].expand(count, 2, 4)
    return FirstExit(found, found, torch.zeros(count, 2, 2, 4))


def test_the_four_pairs_with_the_largest_errors_are_drawn_from_the_top(pairs, tmp_path):
    outputs = exits(6, [1.0, 5.0, 0.5, 3.0, 2.0, 9.0])
    draw_pairs(outputs, pairs, unpack_pair(pairs.labels), tmp_path / "a.png")
    picture = pixels_of(tmp_path / "a.png")
    places = [middle_row(picture, SOLID[number]) for number in (1, 3, 4, 0)]
    assert places == sorted(places)
    for left_out in (2, 5):  # the smallest, and one without truth
        assert not share_of(picture, SOLID[left_out]).any()


def test_no_pairs_and_pairs_without_truth_are_drawn(pairs, tmp_path):
    truth = unpack_pair(pairs.labels)
    last = [5]
    some = type(truth)(*(each[last] for each in truth))
    draw_pairs(exits(1, [2.0]), pairs.take(torch.tensor(last)), some, tmp_path / "a.png")
    assert share_of(pixels_of(tmp_path / "a.png"), SOLID[5]).any()


def test_masks_are_drawn_below_their_images_in_the_colours_of_classes(tmp_path):
    labels = np.zeros((2, 8, 8), int)
    labels[0, :, :4], labels[1] = 1, 2
    draw_masks(solid(2, 3, 8, 8), {"labels": labels, "none": 0 * labels}, tmp_path / "a.png")
    picture = pixels_of(tmp_path / "a.png")
    counts = [share_of(picture, colour).sum() for colour in MASK]
    whole = share_of(picture, SOLID[0]).sum()
    assert counts[1] / whole == pytest.approx(0.5, abs=0.05)
    assert counts[2] / whole == pytest.approx(1.0, abs=0.05)
    assert counts[0] / whole == pytest.approx(2.5, abs=0.1)
    assert middle_row(picture, SOLID[0]) < middle_row(picture, MASK[2])
    draw_masks(solid(2, 3, 8, 8)[:0], {"labels": labels[:0]}, tmp_path / "none.png")
    assert (pixels_of(tmp_path / "none.png") > 200).mean() > 0.5


def logits_of(*texts):
    found = torch.full((len(texts), 6, 4), -9.0)
    for row, text in zip(found, texts, strict=True):
        row[torch.arange(6), torch.tensor(text)] = 9.0
    return found


def words(count):
    labels = torch.tensor([[1, 2, 0], [3, 0, 0], [1, 1, 0]][:count])
    return Split(
        torch.full((count, 1, 32, 64), 128, dtype=torch.uint8), torch.arange(count), labels
    )


def test_probabilities_of_the_symbols_that_were_read_are_drawn(tmp_path):
    outputs = logits_of([1, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0])  # ab, and nothing
    draw_texts(outputs, words(2), ("", "a", "b", "$"), tmp_path / "a.png")
    picture = pixels_of(tmp_path / "a.png")
    sure = share_of(picture, (8, 48, 107), 6)  # the darkest of Blues
    assert sure.any(axis=0).mean() > 0.1  # two of six steps, in half of the picture
    rows = np.flatnonzero(sure.any(axis=1))
    assert rows.max() < picture.shape[0] / 2  # in the first text alone
    draw_texts(outputs[:0], words(0), ("", "a", "b", "$"), tmp_path / "none.png")
    assert pixels_of(tmp_path / "none.png").size


def test_bars_of_confusions_are_as_long_as_they_are_frequent(tmp_path):
    outputs = logits_of([1, 0, 3, 0, 0, 0], [2, 0, 0, 0, 0, 0], [1, 0, 3, 0, 0, 0])
    labels = torch.tensor([[1, 2], [3, 0], [1, 2]])  # b as $ twice, and $ as b once
    draw_confusion(outputs, labels, ("", "a", "b", "$"), tmp_path / "a.png")
    bars = share_of(pixels_of(tmp_path / "a.png"), (31, 119, 180), 4).sum(axis=1)
    upper, lower = (bars[part] for part in np.array_split(np.arange(len(bars)), 2))
    assert upper.max() == pytest.approx(2 * lower.max(), rel=0.05)
    draw_confusion(outputs, labels * 0, ("", "a", "b", "$"), tmp_path / "none.png")
    assert not share_of(pixels_of(tmp_path / "none.png"), (31, 119, 180), 4).any()


POINTS = np.random.default_rng(0).uniform(-0.05, 0.05, (40, 3))
AHEAD = Pose(np.eye(3), np.array([-0.17, -0.12, 0.6]))


def poses(inside):
    row = pack(
        AHEAD, CAMERA, (100, 60, 160), False, project(POINTS, AHEAD, CAMERA), np.ones((2, 4, 4))
    )
    truth = unpack(torch.from_numpy(row)[None])
    found = codes(truth, 6)
    outputs = PoseCodes(
        2 * found.inside[:, None] * inside - 1,
        *(2 * found.x - 1, 2 * found.y - 1),
        *(torch.ones(1, 2, 4, 4), torch.from_numpy(POINTS).float()[None], torch.zeros(1, 2, 40)),
    )
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    return outputs, Split(white, torch.arange(1), truth.symmetric[:, None]), truth


def test_a_true_pose_is_green_and_an_estimated_one_blue(tmp_path):
    draw_poses(*poses(1.0), tmp_path / "both.png")
    draw_poses(*poses(0.0), tmp_path / "none.png")
    both, none = pixels_of(tmp_path / "both.png"), pixels_of(tmp_path / "none.png")

    def count(picture, more, less):
        return (picture[..., more] > picture[..., less] + 20).sum()

    assert count(none, 1, 2) > 50  # green
    assert count(none, 2, 1) == 0  # blue
    assert count(both, 2, 1) > 50


@pytest.mark.slow
def test_wrong_bits_darken_keypoints(tmp_path):
    outputs, _, truth = poses(1.0)
    draw_keypoints(outputs, truth, tmp_path / "right.png")
    draw_keypoints(outputs._replace(x=-outputs.x), truth, tmp_path / "wrong.png")
    right, wrong = (pixels_of(tmp_path / f"{name}.png") for name in ("right", "wrong"))
    left = np.s_[:, : int(0.35 * right.shape[1])]  # beside the colours' scale
    assert (right[left].max(axis=-1) < 60).sum() < (wrong[left].max(axis=-1) < 60).sum()


def test_scores_of_places_are_darkest_where_they_are_highest(tmp_path):
    scores = np.zeros((4, 4))
    scores[:, 0] = 1.0
    draw_scores(scores, np.arange(4), tmp_path / "a.png")
    sure = share_of(pixels_of(tmp_path / "a.png"), (8, 48, 107), 6)
    columns = np.flatnonzero(sure.sum(axis=0) > 50)
    assert columns.max() - columns.min() < 0.3 * sure.shape[1]


@pytest.mark.slow
def test_fields_and_activity_of_few_neurons_are_drawn(tmp_path):
    small = Settings(places_per_module=2, neurons=3, side=4, presentations=1)
    modules = ModularSNN(small).fit(np.random.default_rng(0).integers(0, 256, (1, 2, 4, 4)))
    draw_fields(modules, tmp_path / "fields.png")
    field = pixels_of(tmp_path / "fields.png")
    assert field.shape[1] > 2 * field.shape[0]  # three in a row
    modules.threshold = 1
    draw_activity(modules, tmp_path / "activity.png")
    draw_recalls({0: 0.5, 3: 0.25, 5: 0.75}, 5, tmp_path / "recalls.png")
    for name in ("activity", "recalls"):  # with the chosen threshold
        assert share_of(pixels_of(tmp_path / f"{name}.png"), (234, 88, 12), 8).any()
    draw_recalls({0: 0.5}, 0, tmp_path / "off.png")
    assert not share_of(pixels_of(tmp_path / "off.png"), (234, 88, 12), 8).any()
