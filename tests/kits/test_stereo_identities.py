"""Identities of matching, of the loss and of generated pairs, in float64 and by loops."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from smallfry.errors import DataError
from smallfry.kits.stereo.losses import disparity_loss, semantic_loss
from smallfry.kits.stereo.metrics import Errors, mean_iou, score
from smallfry.kits.stereo.models import StereoOutput
from smallfry.kits.stereo.planes import PlaneSettings, draw_pair
from smallfry.kits.stereo.task import Stereo
from smallfry.kits.stereo.truth import at_exit, class_weights, pack, unpack, weighted
from smallfry.kits.stereo.volume import difference_volume, soft_argmin, warp
from smallfry_runtime.decoders.stereo import decode, enlarge


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_warped_features_are_read_pixel_by_pixel(seed):
    """Linear between columns, 0 a whole pixel outside, and in between a share of the last one."""
    right = noise(seed, 2, 3, 4, 9)
    disparity = 6 * noise(seed + 10, 2, 2, 4, 9)
    found = warp(right, disparity)
    assert found.shape == (2, 3, 2, 4, 9)
    padded = torch.nn.functional.pad(right, (40, 40))
    for b, d, v, u in np.ndindex(2, 2, 4, 9):
        place = u - disparity[b, d, v, u].item()
        low = int(np.floor(place))
        share = place - low
        wanted = padded[b, :, v, 40 + low] * (1 - share) + padded[b, :, v, 41 + low] * share
        assert_close(found[b, :, d, v, u], wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1)])
def test_views_of_one_row_or_column_are_matched(size):
    left, right = noise(0, 1, 2, *size), noise(1, 1, 2, *size)
    candidates = torch.zeros(1, 1, *size, dtype=torch.float64)
    assert_close(difference_volume(left, right, candidates)[:, :, 0], left - right)
    assert_close(difference_volume(left, right, 1)[:, :, 0], left - right)


def test_more_candidates_than_columns_leave_the_left_features():
    left, right = noise(0, 1, 2, 3, 4), noise(1, 1, 2, 3, 4)
    volume = difference_volume(left, right, 6)
    assert volume.shape == (1, 2, 6, 3, 4)
    assert torch.equal(volume[:, :, 4], left)
    assert torch.equal(volume[:, :, 5], left)


@pytest.mark.parametrize("seed", range(4))
def test_the_mean_candidate_forgets_a_constant_and_follows_a_shift(seed):
    cost = noise(seed, 2, 5, 3, 4)
    candidates = torch.arange(5, dtype=torch.float64)
    found = soft_argmin(cost, candidates)
    assert_close(soft_argmin(cost + 1000, candidates), found)
    assert_close(soft_argmin(cost, candidates - 2), found - 2)
    assert_close(soft_argmin(cost.flip(1), candidates), 4 - found)
    assert_close(soft_argmin(cost * 0, candidates), torch.full_like(found, 2.0))
    cheapest = soft_argmin(1e6 * cost, candidates)
    assert torch.equal(cheapest.long(), cost.argmin(dim=1))


def test_smooth_losses_join_at_one_pixel_with_one_slope():
    errors = torch.tensor([1 - 1e-7, 1.0, 1 + 1e-7, -1.0, 5.0], dtype=torch.float64)
    wanted = torch.zeros(1, 1, 5, dtype=torch.float64)
    found = errors.view(1, 1, 5).clone().requires_grad_()
    losses = [
        disparity_loss(found, wanted, torch.arange(5).eq(i).view(1, 1, 5)).sum() for i in range(5)
    ]
    assert [round(loss.item(), 6) for loss in losses] == [0.5, 0.5, 0.5, 0.5, 4.5]
    torch.stack(losses).sum().backward()
    assert_close(found.grad.ravel(), errors.clamp(-1, 1), atol=1e-6, rtol=0)


def test_a_pair_loses_the_same_in_any_batch():
    logits, labels = noise(0, 3, 4, 5, 6), torch.randint(-1, 4, (3, 5, 6))
    labels[1] = -1
    weights = noise(1, 3, 4).abs()
    together = semantic_loss(logits, labels, weights)
    for i in range(3):
        own = slice(i, i + 1)
        assert_close(semantic_loss(logits[own], labels[own], weights[own]), together[own])
    assert together[1] == 0


@pytest.mark.parametrize("kappa", [1.02, 1.12, 2.0, 10.0])
def test_rarer_classes_weigh_more_and_all_sum_to_their_number(kappa):
    shares = np.array([0.6, 0.25, 0.1, 0.05, 0.0])
    weights = class_weights(shares, kappa)
    assert weights.sum() == pytest.approx(5, abs=1e-12)
    assert (np.diff(weights) > 0).all()
    assert class_weights(shares[::-1], kappa) == pytest.approx(weights[::-1])
    assert class_weights(np.full(3, 1 / 3), kappa) == pytest.approx(np.ones(3))
    assert class_weights(np.ones(1), kappa) == pytest.approx([1.0])


def packed(disparity, hidden=None, labels=None, classes=3, **camera):
    disparity = np.asarray(disparity, float)
    hidden = np.zeros(disparity.shape, bool) if hidden is None else hidden
    labels = np.zeros(disparity.shape, int) if labels is None else labels
    return torch.from_numpy(pack(disparity, hidden, labels, classes, **camera))[None]


def test_half_of_a_block_makes_its_disparity_known_and_less_does_not():
    flat = np.zeros((16, 32))
    flat[:2, :4] = 8.0  # half of the first block of 4×4
    flat[:2, 4:8] = 8.0
    flat[0, 4] = 0.0  # one pixel less than half of the second
    found = at_exit(unpack(packed(flat)), 4)
    assert found.known[0, 0].tolist() == [True] + [False] * 7
    assert found.disparity[0, 0, 0] == 2.0  # of the known pixels alone


def test_of_equal_counts_the_first_class_is_the_blocks():
    labels = np.full((4, 8), -1)
    labels[:2, :4], labels[2:, :4] = 2, 1
    labels[0, 4] = 2
    found = at_exit(unpack(packed(np.ones((4, 8)), labels=labels)), 4)
    assert found.labels[0, 0].tolist() == [1, 2]


def test_weights_replace_those_of_all_rows_alone():
    rows = torch.cat([packed(np.ones((2, 3))), packed(2 * np.ones((2, 3)))])
    changed = weighted(rows, np.array([0.5, 1.0, 1.5]))
    assert unpack(changed).weights.tolist() == [[0.5, 1.0, 1.5]] * 2
    assert unpack(rows).weights.tolist() == [[1.0] * 3] * 2
    assert torch.equal(unpack(changed).disparity, unpack(rows).disparity)


@pytest.mark.parametrize(
    "rows",
    [
        packed(np.ones((2, 3)))[:, :-1],
        packed(np.ones((2, 3)))[:0],
        packed(np.ones((2, 3)))[0],
        torch.zeros(2, 5),
        torch.ones(1, 1, 40),
    ],
)
def test_rows_of_another_form_are_no_truth(rows):
    with pytest.raises(DataError, match="the task stereo needs pairs of views with disparities"):
        unpack(rows)


def test_errors_of_parts_add_up_to_those_of_the_whole():
    found, wanted = 10 * noise(0, 6, 4, 5).abs(), 10 * noise(1, 6, 4, 5).abs()
    chosen = noise(2, 6, 4, 5) > 0
    parts = Errors()
    for rows in ([0], [1, 2, 3], [4, 5]):
        parts.add(found[rows], wanted[rows], chosen[rows])
    whole = Errors()
    whole.add(found, wanted, chosen)
    assert parts.means() == pytest.approx(whole.means())


def test_intersection_over_union_is_that_of_pixel_sets():
    random = np.random.default_rng(0)
    true, said = random.integers(0, 4, 300), random.integers(0, 3, 300)
    counts = np.zeros((5, 5), int)
    np.add.at(counts, (true, said), 1)
    sets = [(true == k, said == k) for k in range(4)]
    wanted = [(one & other).sum() / (one | other).sum() for one, other in sets]
    assert mean_iou(torch.from_numpy(counts)) == pytest.approx(np.mean(wanted))  # the 5th: nowhere


def flat_outputs(disparity, pairs=1, size=(32, 64), classes=3):
    maps = []
    for factor in (16, 8, 4):
        shape = (size[0] // factor, size[1] // factor)
        maps += [torch.full((pairs, *shape), disparity / factor)] * 2
        maps.append(torch.zeros(pairs, classes, *shape))
    return StereoOutput(*maps)


def test_scores_of_many_pairs_are_those_of_all_at_once():
    """More pairs than are scored at a time."""
    rows = torch.cat([packed(np.full((32, 64), 4.0 + i % 3)) for i in range(70)])
    found = score(flat_outputs(4.0, 70), unpack(rows))
    counts = np.bincount(np.arange(70) % 3)
    assert found["epe_3"] == pytest.approx((counts * [0, 1, 2]).sum() / 70)
    assert found["bad1_3"] == pytest.approx(counts[2] / 70)
    assert found["d1_1"] == 0
    assert found["pixels_2"] == 1.0


def test_pairs_without_any_known_pixel_score_nothing_and_break_nothing():
    nothing = packed(np.zeros((32, 64)), labels=np.full((32, 64), -1), scale=20.0)
    scores = Stereo().metrics(flat_outputs(4.0), nothing)
    assert scores["loss"] == 0
    assert scores["epe_3"] == scores["epe_all_1"] == scores["miou"] == scores["pixels_3"] == 0
    assert "depth_error" not in scores


def test_a_point_without_a_depth_has_no_error_of_depth():
    """Where the cameras' centres differ, a disparity plus the offset may be 0."""
    known = np.full((32, 64), 4.0)
    known[:, :32] = 2.0
    rows = packed(known, scale=20.0, offset=-2.0)
    found = score(flat_outputs(6.0), unpack(rows))["depth_error"]
    assert found == pytest.approx(20 / 2 - 20 / 4)


def arrays(outputs):
    return {name: value.numpy() for name, value in outputs._asdict().items()}


def image_of(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 7), (1, 2, 5, 1)])
@pytest.mark.parametrize("factor", [1, 3, 4])
def test_maps_of_one_row_or_column_are_enlarged_as_by_pytorch(shape, factor):
    values = noise(0, *shape).float()
    wanted = torch.nn.functional.interpolate(values, scale_factor=factor, mode="bilinear")
    assert np.abs(enlarge(values.numpy(), factor) - wanted.numpy()).max() < 1e-5


def test_disparities_beyond_16_bits_are_cut_off_and_statistics_are_not():
    outputs = flat_outputs(300.0)
    outputs.refined4[0, :, :8] = -5.0
    (found,) = decode(arrays(outputs), ("a", "b", "c"))
    stored = image_of(found["disparity_png16"])
    assert stored.dtype == np.uint16
    assert (stored.min(), stored.max()) == (0, 65535)
    assert found["disparity"]["least"] == -20.0
    assert found["disparity"]["greatest"] == 300.0
    assert found["shares"] == {"a": 1.0}  # of equal logits the first class


def test_far_points_have_the_depth_of_half_a_pixel():
    settings = {"focal": 100, "baseline": 0.5}
    (found,) = decode(arrays(flat_outputs(0.0)), ("a", "b", "c"), settings)
    assert found["depth_m"] == {"a": 100.0}
    assert "depth_m" not in decode(arrays(flat_outputs(0.0)), ("a", "b", "c"))[0]


@pytest.mark.parametrize("number", [0, 5])
@pytest.mark.parametrize("size", [(32, 64), (64, 96)])
def test_hidden_points_are_covered_by_nearer_ones_or_out_of_view(number, size):
    """The right view has something nearer at their place; or they are an object's last pixel,
    whose place half a pixel further is beside it there."""
    pair = draw_pair(PlaneSettings(objects=6), "train", number, size)
    rows, columns = np.nonzero(pair.hidden)
    place = columns - pair.disparity[rows, columns]
    inside = place >= 0
    there = np.rint(place[inside]).astype(int)
    nearest = pair.right_disparity[rows[inside], there]
    own = pair.disparity[rows, columns][inside]
    assert (np.abs(nearest - own) > 0.75).all()
    assert (nearest > own).mean() > 0.5
    padded = np.pad(pair.disparity, ((0, 0), (1, 1)), constant_values=-1.0)
    beside = [padded[rows[inside], columns[inside] + step] != own for step in (0, 2)]
    assert (beside[0] | beside[1])[nearest < own].all()
    assert pair.disparity.shape == pair.labels.shape == pair.hidden.shape == size


def test_differences_of_the_cameras_change_no_truth():
    plain = draw_pair(PlaneSettings(cameras=0.0), "train", 2)
    other = draw_pair(PlaneSettings(cameras=2.0), "train", 2)
    for name in ("disparity", "labels", "hidden", "right_disparity"):
        assert np.array_equal(getattr(plain, name), getattr(other, name))
    assert not np.array_equal(plain.left, other.left)
