"""Groups against SciPy, maps of digits by their definition, and networks at their ends."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from scipy.linalg import expm
from scipy.linalg import polar as scipys_polar
from scipy.spatial.transform import Rotation

from smallfry.errors import UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.equivariant.digits import MNIST, AffineDigits, distort, draw_matrix, resample
from smallfry.kits.equivariant.group import (
    GL,
    SL,
    angle,
    log_rotation,
    map_eigenvalues,
    polar,
    rotations,
    sample_rotations,
    symmetric,
)
from smallfry.kits.equivariant.models import GResNet, PlainResNet
from smallfry.kits.equivariant.pictures import accuracy_by_angle, draw_turns, turn
from smallfry.kits.equivariant.task import Equivariant, turned_alike

load_kit("equivariant")
SMALL = {"width": 3, "psi_width": 6, "psi_hidden": 1}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Groups


@pytest.mark.parametrize("n", [2, 3, 5])
def test_decompositions_are_scipys_whatever_the_layout_and_precision(n):
    g = GL(n, 0.5).sample(12, generator()).elements
    p, r = polar(g)
    for one, found in zip(g, zip(p, r, strict=True), strict=True):
        u, wanted = scipys_polar(one.numpy(), side="left")
        assert found[0].numpy() == pytest.approx(wanted, abs=1e-12)
        assert found[1].numpy() == pytest.approx(u, abs=1e-12)
    batched = polar(g.view(3, 4, n, n).transpose(0, 1))  # not contiguous
    torch.testing.assert_close(batched[0], p.view(3, 4, n, n).transpose(0, 1))
    single = polar(g.float())
    assert single[0].dtype == torch.float32
    torch.testing.assert_close(single[1].double(), r, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("group", "n"), [(GL, 2), (SL, 2), (GL, 4), (SL, 4)])
def test_coordinates_of_batches_are_those_of_single_elements(group, n):
    g = group(n).sample(6, generator(1)).elements.view(2, 3, n, n)
    found = group(n).coordinates(g)
    assert found.shape == (2, 3, group(n).dimension)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(group(n).coordinates(g[i, j]), found[i, j])
    identity = group(n).coordinates(torch.eye(n, dtype=torch.float64))
    assert identity.abs().max() < 1e-14
    k = sample_rotations(1, n, generator(2))[0]
    log_p = map_eigenvalues(polar(g)[0], "log")
    moved = map_eigenvalues(polar(k @ g)[0], "log")
    torch.testing.assert_close(moved, k @ log_p @ k.T, rtol=0, atol=1e-12)


def test_angles_near_zero_and_a_full_turn():
    for given, wanted in ((0.0, 0.0), (-1e-7, 0.0), (1e-7, 0.0), (-1e-3, 2 * math.pi - 1e-3)):
        r = torch.tensor(Rotation.from_euler("z", given).as_matrix()[:2, :2])
        assert angle(r).item() == pytest.approx(wanted, abs=1e-6)
    turns = torch.linspace(0.01, 6.27, 50, dtype=torch.float64)
    r = torch.stack([rotations(1, float(t)).elements[0] for t in turns])
    torch.testing.assert_close(angle(r), turns)


def test_logarithms_are_undone_by_exp_and_are_antisymmetric():
    for n in (3, 4, 6):
        r = sample_rotations(8, n, generator(n))
        logs = log_rotation(r)
        torch.testing.assert_close(logs, -logs.mT, rtol=0, atol=1e-12)
        for log, one in zip(logs, r, strict=True):
            assert expm(log.numpy()) == pytest.approx(one.numpy(), abs=1e-11)
    vectors = np.random.default_rng(0).normal(size=(9, 3))
    spins = Rotation.from_rotvec(vectors)
    x, y, z = spins.as_rotvec().T
    logs = log_rotation(torch.tensor(spins.as_matrix())).numpy()
    assert np.stack([logs[:, 2, 1], logs[:, 0, 2], logs[:, 1, 0]]) == pytest.approx(
        np.stack([x, y, z]), abs=1e-12
    )


@pytest.mark.parametrize("n", [2, 3, 4])
def test_coordinates_of_symmetric_matrices_are_orthonormal(n):
    whole = n * (n + 1) // 2
    for count in (whole, whole - 1):
        basis = symmetric(torch.eye(count, dtype=torch.float64), n)
        assert torch.equal(basis, basis.mT)
        gram = torch.einsum("aij,bij->ab", basis, basis)
        torch.testing.assert_close(gram, torch.eye(count, dtype=torch.float64), atol=1e-14, rtol=0)
        traces = basis.diagonal(dim1=1, dim2=2).sum(1)
        assert (traces.abs().max() < 1e-14) == (count < whole)


def test_samples_of_the_plane_are_turned_evenly():
    for count in (1, 5):
        elements, inverses = GL(2, 0.3).sample(count, generator(4))
        angles = angle(polar(elements)[1])
        apart = (angles - angles[0]).remainder(2 * math.pi)
        wanted = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
        assert apart.tolist() == pytest.approx(wanted.tolist(), abs=1e-9)
        torch.testing.assert_close(inverses, torch.linalg.inv(elements))
    still = SL(2, 0.0).sample(4, generator()).elements
    torch.testing.assert_close(still @ still.mT, torch.eye(2).double().expand(4, 2, 2))
    assert len(GL().sample(0).elements) == len(rotations(0).elements) == 0


# Digits


def by_definition(original, size, pixels, matrix):
    """Look up each pixel's place in the digit, bilinearly with zeros outside."""
    rows, found = len(original), np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            place = np.array([j - (size - 1) / 2, i - (size - 1) / 2]) - matrix[:, 2]
            x, y = np.linalg.solve(matrix[:, :2], place) * rows / pixels + (rows - 1) / 2
            for row in range(rows):
                for column in range(rows):
                    share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                    found[i, j] += share * original[row, column]
    return found


@pytest.mark.parametrize(("rows", "size", "pixels"), [(5, 9, 6), (4, 8, 8), (6, 11, 3.5)])
def test_maps_look_up_every_pixel(rows, size, pixels):
    random = np.random.default_rng(size)
    original = random.integers(0, 256, (rows, rows)).astype(np.uint8)
    linear = draw_matrix(AffineDigits(rotation=180.0, shear=1.0), random)
    matrix = np.concatenate([linear, random.normal(size=(2, 1))], axis=1)
    found = resample(original, size, pixels, matrix)
    assert found == pytest.approx(by_definition(original, size, pixels, matrix), abs=1e-9)


def test_large_digits_are_kept_inside_too_and_versions_move_them():
    pixels = np.zeros((28, 28), np.uint8)
    pixels[9:22, 3:9] = 200
    shape = (MNIST[0], MNIST[1])
    seen = set()
    for version in range(12):
        found = distort(pixels, AffineDigits(), "test", 4, version, shape)
        wide = resample(pixels, 80, shape[1], found.matrix)
        assert wide[20:60, 20:60].sum() == pytest.approx(wide.sum(), rel=1e-9)
        assert found.pixels.shape == (1, 40, 40)
        seen.add(tuple(found.matrix[:, 2]))
    assert len(seen) == 12


def test_maps_without_a_range_leave_digits_upright():
    original = np.arange(64, dtype=np.uint8).reshape(8, 8)
    still = AffineDigits(rotation=0.0, shear=0.0, scale_low=1.0, scale_high=1.0, translation="none")
    found = distort(original, still, "train", 0)
    assert np.array_equal(found.matrix, np.eye(2, 3))
    assert np.array_equal(found.pixels[0], np.rint(resample(original, 16, 10, np.eye(2, 3))))


@pytest.mark.parametrize("degrees", [30.0, -75.0, 200.0, 450.0])
def test_turns_are_counter_clockwise_as_scipys(degrees):
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(2, 1, 21, 21)), 2.0)
    images = torch.tensor(smooth)
    found = turn(images, degrees).numpy()
    # SciPy's angle is from the first axis to the second: counter-clockwise where rows go down
    wanted = ndimage.rotate(smooth, degrees, axes=(3, 2), reshape=False, order=1)
    inside = (slice(None), slice(None), slice(5, 16), slice(5, 16))
    flipped = ndimage.rotate(smooth, -degrees, axes=(3, 2), reshape=False, order=1)
    errors = [np.abs(found - each)[inside].max() for each in (wanted, flipped)]
    assert min(errors) < 1e-6 * np.abs(smooth).max() + 1e-6
    quarter = turn(images, 90).numpy()
    there = [ndimage.rotate(smooth, s * 90, axes=(3, 2), reshape=False) for s in (1, -1)]
    same = int(np.abs(quarter - there[0]).max() > 1e-6)
    assert np.abs(quarter - there[same]).max() < 1e-6
    if degrees == 30.0:  # the same sense as that of quarter turns
        assert errors[same] == min(errors)


# Networks


@pytest.mark.parametrize(("samples", "turns"), [(1, ()), (2, (2,)), (8, (1, 2, 3))])
@pytest.mark.parametrize("side", [14, 18])
def test_turns_of_a_network_are_those_of_its_samples(samples, turns, side):
    torch.manual_seed(0)
    model = GResNet(in_chans=3, samples=samples, sampling="turns", **SMALL).double().eval()
    images = torch.rand(2, 3, side, side, dtype=torch.float64)
    for number in (1, 2, 3):
        change = turned_alike(model, images, number)[1].max()
        assert (change < 1e-11) == (number in turns)
    same, change = turned_alike(model, images[:0])
    assert (len(same), len(change)) == (0, 0)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_kernels_of_other_sizes_have_the_smallest_images_that_fit(kernel_size):
    least = 3 * kernel_size - 1
    for model in (
        GResNet(samples=2, kernel_size=kernel_size, **SMALL),
        PlainResNet(width=3, kernel_size=kernel_size),
    ):
        model.eval()
        assert model(torch.rand(1, 1, least, least + 3)).shape == (1, 10)
        with pytest.raises(UsageError, match=rf"at least {least}×{least} pixels, not {least}×"):
            model(torch.rand(1, 1, least, least - 1))


@pytest.mark.parametrize("make", [GResNet, PlainResNet])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel_size": 4}, "kernel_size odd, got .* and 4"),
        ({"kernel_size": 0}, "kernel_size odd, got .* and 0"),
        ({"kernel_size": -3}, "kernel_size odd, got .* and -3"),
        ({"width": 0}, "width is at least 1 and kernel_size odd, got 0 and 5"),
    ],
)
def test_networks_without_channels_or_a_middle_are_refused(make, settings, words):
    with pytest.raises(UsageError, match=words):
        make(**settings)


def test_draws_are_a_function_of_the_seed_and_their_number():
    one, other = (GResNet(samples=3, seed=7, **SMALL).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    images = torch.rand(1, 1, 14, 14)
    first, second = one(images), one(images)
    assert int(one.draws) == 3  # one when it was built
    assert torch.equal(other(images), first)
    assert torch.equal(other(images), second)
    assert not torch.equal(one.elements[0], one.elements[1])
    different = GResNet(samples=3, seed=8, **SMALL)
    assert not torch.equal(different.elements, GResNet(samples=3, seed=7, **SMALL).elements)


def test_features_do_not_change_with_contrast():
    """Norms over each image take its scale, and the lifting has no bias."""
    model = PlainResNet(width=3).double().eval()
    images = torch.rand(2, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(images)
        assert (model(1000 * images) - wanted).abs().max() < 1e-3 * wanted.abs().max()
        assert model(images[:1]) == pytest.approx(wanted[:1])  # whatever else is in the batch
    model.reset_classifier(0)
    assert model(images).shape == (2, 256)


def test_the_task_keeps_label_smoothing_of_classification():
    task = Equivariant(label_smoothing=0.2)
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    targets = torch.tensor([[1 - 0.2 + 0.2 / 3, 0.2 / 3, 0.2 / 3]])
    wanted = -(targets * logits.log_softmax(1)).sum()
    shares = torch.nn.functional.one_hot(labels, 3).float()
    assert task.loss(logits, task.targets(labels, shares)).item() == pytest.approx(wanted.item())


# Pictures


class Left(torch.nn.Module):
    """Logits: brightness on the left and on the right."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        halves = images[..., :4].mean((1, 2, 3)), images[..., -4:].mean((1, 2, 3))
        return self.scale * torch.stack(halves, dim=1)


def test_accuracies_by_angle_follow_the_half_of_a_circle(tmp_path):
    images = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    images[..., :4] = 255
    angles = (0, 80, 100, 180, -80, -100, 280, 360)
    found = accuracy_by_angle(Left(), images, torch.zeros(1).long(), torch.Tensor.float, angles)
    assert found == [1, 1, 0, 0, 1, 0, 1, 1]
    assert accuracy_by_angle(Left(), images, torch.zeros(1).long(), torch.Tensor.float, ()) == []
    draw_turns(images, {"": found}, angles, tmp_path / "one.png")
    draw_turns(images, {"named": found, "other": found}, angles, tmp_path / "two.png")
    pixels = [
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("one", "two")
    ]
    assert pixels[0].shape == pixels[1].shape
    top = pixels[0][: pixels[0].shape[0] // 5]
    assert (top < 20).mean() > 0.1  # black of the turned images
    assert (pixels[0] != pixels[1]).any()  # a legend
