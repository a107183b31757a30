"""Settings of splats and numbers at their ends: rounding, codes, boxes, and the loss of views."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.splats.artifact import load
from smallfry.kits.splats.cameras import ring
from smallfry.kits.splats.codec import NeuralSplats, compress, ordered_rows, view_loss
from smallfry.kits.splats.field import SplatField, clusters_of, position_code, quantise, rounded
from smallfry.kits.splats.generate import generate
from smallfry.kits.splats.labels import Labels
from smallfry.kits.splats.prepare import Grid, align_rotations, prepare
from smallfry.kits.splats.scene import RESTS, Scene, column_names

load_kit("splats")
CAMERAS = ring(2, size=16, focal=16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": float("nan")}, "learning rates above 0"),
        ({"finetune_lr": -1.0}, "learning rates above 0"),
        ({"iterations": -1}, "at least 0"),
        ({"layers": 17}, "layers is 1 to 16, got 17"),
        ({"width": 1025}, "width is 1 to 1024"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, words):
    with pytest.raises(UsageError, match=words):
        NeuralSplats(**settings)


def test_numbers_that_half_precision_has_not_are_refused():
    scene = generate("torus", 20)
    attributes = scene.attributes.copy()
    attributes[3, 9] = -7e4
    with pytest.raises(UsageError, match=r"attributes beyond ±65,504 can't be compressed"):
        prepare(Scene(scene.positions, attributes), CAMERAS)
    far = np.full((2, 3), 2e15, np.float32)
    with pytest.raises(UsageError, match=r"positions beyond ±1e\+15"):
        prepare(Scene(far, scene.attributes[:2]), CAMERAS)
    with pytest.raises(UsageError, match=r"position_bits 8 to 16, got 0\.4 and 7"):
        prepare(scene, CAMERAS, bits=7)


def test_equal_and_single_gaussians_are_compressed(tmp_path):
    attributes = np.ones((6, 11), np.float32)
    cameras = ring(2, (1, 1, 1), size=16, focal=16)
    settings = NeuralSplats(clusters=1, width=4, iterations=1, finetune=1, prune=0.5)
    equal = Scene(np.ones((6, 3), np.float32), attributes)
    one = equal.take(np.array([2]))
    for scene, count in ((equal, 3), (one, 1)):
        compress(scene, cameras, settings).save(tmp_path / "a")
        found = load(tmp_path / "a").scene()
        assert len(found) == count
        assert found.positions == pytest.approx(np.ones((count, 3)), abs=1e-6)
        rest = [0, 1, 2, 3, 8, 9, 10]
        assert found.attributes[:, rest] == pytest.approx(np.ones((count, 7)), abs=2e-2)
        assert found.attributes[:, 4:8] == pytest.approx(np.full((count, 4), 0.5), abs=2e-2)


def test_networks_without_gaussians_take_none():
    options = {"gaussians": 10, "views": 2, "pixels": 16}
    labels = load_data("splats-torus", options=options).train.labels
    field = SplatField(clusters=8, width=4)
    field.fit_outputs(labels)
    known = Labels(labels)
    groups = field.groups(known.codes)
    assert field.centres.isfinite().all()
    assert len(groups.unique()) == len(labels) == 6  # one each
    for row, group in zip(known.attributes, groups, strict=True):
        assert field.output_mean[group].tolist() == pytest.approx(row.tolist(), rel=1e-3, abs=1e-3)


def test_the_normalisation_of_inputs_is_undone():
    torch.manual_seed(0)
    field = SplatField(2, 4, 2, 3, 11).double()
    places = torch.randn(50, 3, dtype=torch.float64)
    field.centres.copy_(places[:2])
    wanted = field(places[:, :, None, None])
    mean, deviation = places.mean(0), places.std(0, correction=0)
    field.input_mean.copy_(mean)
    field.input_std.copy_(deviation)
    given = ((places - 0.3) / torch.tensor([1.0, 2.0, 5.0]))[:, :, None, None]  # any affine map
    field.initialize(given)
    torch.testing.assert_close(field(given), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frequencies", [0, 3])
def test_codes_of_positions_are_written_out(frequencies):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    rows = []
    for row in x.tolist():
        code = list(row)
        for value in row:
            for i in range(frequencies):
                turn = torch.tensor(2.0**i * torch.pi * value, dtype=torch.float64)
                code += [turn.sin().item(), turn.cos().item()]
        rows.append(code)
    torch.testing.assert_close(position_code(x, frequencies), torch.tensor(rows).double())


def test_rounding_has_the_gradient_of_the_identity_and_rows_of_zeros_stay():
    weight = torch.randn(3, 5, requires_grad=True)
    rounded(weight, 4).sum().backward()
    assert (weight.grad == 1).all()
    assert rounded(weight, 16) is weight
    codes, scales = quantise(torch.zeros(2, 3), 8)
    assert (codes == 0).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("bits", [8, 11, 16])
def test_the_ends_and_the_middle_of_a_box_are_exact(bits):
    grid = Grid((1.0, -2.0, 0.5), (2.0, 0.25, 8.0), bits)
    corners = np.array([[-1.0, -2.25, -7.5], [3.0, -1.75, 8.5]])
    assert np.array_equal(grid.positions(grid.codes(grid.integers(corners))), corners)
    beyond = grid.integers(corners + np.array([[-1.0], [1.0]]))
    assert np.array_equal(beyond, grid.integers(corners))  # those that were pruned
    if bits == 16:
        assert grid.codes(grid.integers(np.array([[1.0, -2.0, 0.5]]))).tolist() == [[0, 0, 0]]
    flat = Grid.of(np.array([[1.0, 2.0, 3.0]], np.float32), bits)
    assert min(flat.half_sides) > 0
    half = grid.integers(np.random.default_rng(0).uniform(-8, 8, (50, 3)))
    assert np.array_equal(Grid((0, 0, 0), (1, 1, 1), bits).integers(grid.codes(half)), half)


def test_rows_are_ordered_by_cluster_then_by_position():
    random = np.random.default_rng(0)
    groups, integers = random.integers(3, size=30), random.integers(4, size=(30, 3))
    rows, counts = ordered_rows(np.arange(100, 130), groups, integers.astype(np.uint16))
    keys = [(groups[i - 100], *integers[i - 100]) for i in rows]
    assert keys == sorted(keys)
    assert counts == np.bincount(groups).tolist()
    assert sorted(rows) == [*range(100, 130)]
    assert clusters_of(np.zeros((1, 2)), 5).tolist() == [0]


def test_signs_of_few_or_equal_rotations():
    single = np.array([[-0.5, 0.5, 0.5, 0.5]])
    assert np.array_equal(align_rotations(np.zeros((1, 3)), single), single)
    same = np.repeat(single, 12, 0) * np.resize([1, -1], (12, 1))
    found = align_rotations(np.zeros((12, 3)), same)  # all in one place
    assert np.abs(found @ found.T - 1).max() < 1e-12


@pytest.mark.parametrize("size", [2, 7, 12])
def test_the_loss_of_views_is_that_of_its_parts(size):
    torch.manual_seed(0)
    found, wanted = torch.rand(2, size, size + 1, 3, dtype=torch.float64)
    window = min(11, size if size % 2 else size - 1)
    reach = (window // 2,) * 4  # the border is mirrored
    padded = [pad(each.movedim(2, 0)[None], reach, "reflect") for each in (found, wanted)]
    patches = [each.unfold(2, window, 1).unfold(3, window, 1).flatten(4) for each in padded]
    m, n = (each.mean(-1) for each in patches)
    v, w = (each.var(-1, correction=0) for each in patches)
    both = (patches[0] * patches[1]).mean(-1) - m * n
    c, d = 1e-4, 9e-4
    alike = ((2 * m * n + c) * (2 * both + d) / ((m**2 + n**2 + c) * (v + w + d))).mean()
    spectrum = np.abs(
        np.abs(np.fft.fft2(found.movedim(2, 0).numpy(), norm="ortho"))
        - np.abs(np.fft.fft2(wanted.movedim(2, 0).numpy(), norm="ortho"))
    ).mean()
    total = 0.8 * (found - wanted).abs().mean() + 0.2 * (1 - alike) + 0.01 * spectrum
    assert view_loss(found, wanted).item() == pytest.approx(total.item(), rel=1e-6)


def test_columns_of_files_are_those_of_their_degree():
    assert [len(column_names(degree)) for degree in range(4)] == [11 + rest for rest in RESTS]
    assert column_names(0)[:2] == ("opacity", "scale_0")
