"""Solvers against dense systems, spectra against sums of waves, and operators under shifts."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from smallfry.data import Split, load_data
from smallfry.errors import DataError, UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.operators.equations import gaussian_field, solve_darcy, solve_helmholtz
from smallfry.kits.operators.fields import (
    DarcySettings,
    HelmholtzSettings,
    darcy_sample,
    helmholtz_sample,
    usual_maximum,
)
from smallfry.kits.operators.models import FNO2d, MgNO, SpectralConv2d
from smallfry.kits.operators.pictures import draw_fields
from smallfry.kits.operators.task import Operators, relative_h1, relative_l2

load_kit("operators")
LEVELS = [(1, 0), (1, 1), (2, 0)]
STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def dense_darcy(a, f):
    """Write the five-point system node by node."""
    n = len(a)
    h = 1 / (n - 1)
    matrix, wanted = np.eye(n * n), np.zeros(n * n)
    for y in range(1, n - 1):
        for x in range(1, n - 1):
            row = y * n + x
            matrix[row, row] = 0
            for dy, dx in STEPS:
                face = (a[y, x] + a[y + dy, x + dx]) / 2
                matrix[row, row] += face / h**2
                matrix[row, (y + dy) * n + x + dx] -= face / h**2
            wanted[row] = f[y, x]
    return np.linalg.solve(matrix, wanted).reshape(n, n)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_flows_solve_the_dense_system(n):
    random = np.random.default_rng(n)
    a, f = random.uniform(1, 9, (n, n)), random.normal(size=(n, n))
    found = solve_darcy(a, f)
    assert found.shape == (n, n)
    assert found == pytest.approx(dense_darcy(a, f), abs=1e-13)
    assert solve_darcy(a) == pytest.approx(dense_darcy(a, np.ones((n, n))), abs=1e-13)


def test_flows_have_the_symmetries_of_their_equation():
    random = np.random.default_rng(0)
    a, f = random.uniform(1, 9, (7, 7)), random.normal(size=(7, 7))
    u = solve_darcy(a, f)
    assert solve_darcy(4 * a, f) == pytest.approx(u / 4, rel=1e-10)
    assert solve_darcy(a.T, f.T) == pytest.approx(u.T, rel=1e-9, abs=1e-14)
    assert solve_darcy(a[::-1], f[::-1]) == pytest.approx(u[::-1], rel=1e-9, abs=1e-14)
    assert solve_darcy(a)[1:-1, 1:-1].min() > 0  # a source everywhere
    one, other = np.zeros((2, 7, 7))
    one[2, 3], other[5, 1] = 1, 1
    assert solve_darcy(a, one)[5, 1] == pytest.approx(solve_darcy(a, other)[2, 3], rel=1e-10)


def dense_helmholtz(k, g):
    """Write the system with ghost nodes that mirror their neighbours."""
    n = len(k)
    h = 1 / (n - 1)
    matrix, wanted = np.zeros((n * n, n * n)), np.zeros(n * n)
    for y in range(n):
        for x in range(n):
            row = y * n + x
            matrix[row, row] = 4 - (k[y, x] * h) ** 2
            for dy, dx in STEPS:
                at = [y + dy, x + dx]
                if at[0] == n:  # u(ghost) = u(mirror) + 2 h g
                    wanted[row] += 2 * h * g(np.linspace(0, 1, n))[x]
                at = [-i if i < 0 else 2 * (n - 1) - i if i >= n else i for i in at]
                matrix[row, at[0] * n + at[1]] -= 1
    return np.linalg.solve(matrix, wanted).reshape(n, n)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_waves_solve_the_dense_system(n):
    k = np.random.default_rng(n).uniform(2, 6, (n, n))
    found = solve_helmholtz(k, np.exp)
    assert found == pytest.approx(dense_helmholtz(k, np.exp), rel=1e-9, abs=1e-12)
    twice = solve_helmholtz(k, lambda x: 2 * np.exp(x))
    assert twice == pytest.approx(2 * found, rel=1e-9, abs=1e-12)
    mirrored = solve_helmholtz(k[:, ::-1], lambda x: np.exp(1 - x))
    assert mirrored == pytest.approx(found[:, ::-1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (3,), (2, 2, 2), ()])
def test_grids_that_are_none_are_refused(shape):
    for solve in (solve_darcy, lambda k: solve_helmholtz(k, np.exp)):
        with pytest.raises(ValueError, match=r"at the nodes \(n, n\), n ≥ 2, got shape"):
            solve(np.ones(shape))


def test_fields_have_the_spectrum_of_their_covariance():
    n, draws = 9, 1500
    random = np.random.default_rng(0)
    fields = np.stack([gaussian_field(random, n, 2.5, 4.0) for _ in range(draws)])
    waves = dctn(fields, type=2, norm="ortho", axes=(1, 2))
    k = np.arange(n)
    squares = np.pi**2 * (k[:, None] ** 2 + k**2) + 16
    wanted = n * 4.0**1.5 * squares**-1.25
    wanted[0, 0] = 0
    assert (waves / np.maximum(wanted, 1e-9)).std(0)[1:] == pytest.approx(
        np.ones((n - 1, n)), abs=0.1
    )
    assert np.abs(fields.mean((1, 2))).max() < 1e-12
    smoother = gaussian_field(np.random.default_rng(1), 33, 4.0, 3.0)
    rougher = gaussian_field(np.random.default_rng(1), 33, 2.0, 3.0)
    steps = [np.abs(np.diff(each)).mean() / each.std() for each in (smoother, rougher)]
    assert steps[0] < 0.7 * steps[1]


# Samples


@pytest.mark.parametrize("coefficient", ["two", "log-normal"])
def test_a_flow_is_every_second_node_of_a_fine_solution(coefficient):
    settings = DarcySettings(size=9, coefficient=coefficient, low=2.0, high=5.0)
    a, u = darcy_sample(settings, "test", 7)
    field = gaussian_field(np.random.default_rng([0, 2, 7]), 19)
    fine = np.where(field >= 0, 5.0, 2.0) if coefficient == "two" else np.exp(field)
    assert np.array_equal(a[0], fine[:18:2, :18:2].astype(np.float32))
    assert np.array_equal(u[0], solve_darcy(fine)[:18:2, :18:2].astype(np.float32))
    assert a.dtype == u.dtype == np.float32


def test_waves_that_are_left_out_are_counted_and_may_be_all():
    settings = HelmholtzSettings(size=8, seed=3)
    usual = usual_maximum(settings)
    for number in range(6):
        k, u, left_out = helmholtz_sample(settings, "train", number, usual)
        random = np.random.default_rng([3, 0, number])
        for _ in range(left_out + 1):
            field = 8 + 4 * np.tanh(gaussian_field(random, 8))
            wave = solve_helmholtz(field, lambda x: ((x >= 0.35) & (x <= 0.65)).astype(float))
            largest = np.abs(wave).max()
        assert largest <= usual
        assert np.array_equal(k[0], field.astype(np.float32))
        assert np.array_equal(u[0], wave.astype(np.float32))
    with pytest.raises(DataError, match=r"of 100 waves all .* lower data\.options\.spread"):
        helmholtz_sample(settings, "train", 0, 0.0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("operators-darcy", {"low": 0.0}, "low is above 0 and below high"),
        ("operators-darcy", {"high": float("nan")}, "below high, got 3.0 and nan"),
        ("operators-darcy", {"size": 513}, "size is 8 to 512, got 513"),
        ("operators-helmholtz", {"spread": -1.0}, "spread is 0 to below base"),
        ("operators-helmholtz", {"samples": 9}, "samples is 10 to 1,000,000, got 9"),
        ("operators-helmholtz", {"low": 1.0}, "no 'low'"),
    ],
)
def test_options_out_of_range_are_named(name, options, words):
    with pytest.raises(UsageError, match=words):
        load_data(name, options=options)


def test_more_samples_begin_with_those_of_fewer():
    few, many = (
        load_data("operators-darcy", options={"samples": n, "size": 8}, test=0.5, validation=0.0)
        for n in (10, 14)
    )
    assert torch.equal(many.train.images[:5], few.train.images)
    assert torch.equal(many.test.labels[:5], few.test.labels)
    assert len(few.validation) == 0


# Errors


def by_waves(field, cut):
    """Sum squares of waves with their weights, by a loop over frequencies."""
    height, width = field.shape[-2:]
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    total = 0.0
    for p in range(height):
        for q in range(width):
            wave = np.exp(-2j * np.pi * (p * y / height + q * x / width))
            own = [n if 2 * n < size else n - size for n, size in ((p, height), (q, width))]
            kept = [k if abs(k) < cut else 0 for k in own]
            weight = 1 + kept[0] ** 2 + kept[1] ** 2
            total += weight * (np.abs((field * wave).sum((-2, -1))) ** 2).sum()
    return np.sqrt(total)


@pytest.mark.parametrize("cut", [0, 2, 20])
@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 5, 3), (1, 1, 1)])
def test_errors_equal_sums_over_waves(shape, cut):
    found, wanted = torch.randn(2, 3, *shape, dtype=torch.float64)
    sums = [
        by_waves((one - other).numpy(), cut) / by_waves(other.numpy(), cut)
        for one, other in zip(found, wanted, strict=True)
    ]
    assert relative_h1(found, wanted, cut).tolist() == pytest.approx(sums, rel=1e-12)
    if cut == 0:  # Parseval
        torch.testing.assert_close(relative_h1(found, wanted, 0), relative_l2(found, wanted))


def test_errors_do_not_change_with_the_scale_and_h1_counts_waves():
    found, wanted = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    for error in (relative_l2, relative_h1):
        torch.testing.assert_close(error(-3 * found, -3 * wanted), error(found, wanted))
        assert error(0 * wanted, wanted).tolist() == pytest.approx([1, 1, 1])
    x = torch.arange(8) * 2 * torch.pi / 8
    low, high = (torch.cos(k * x).expand(1, 1, 8, 8) for k in (1, 3))
    both = low + high
    ratio = relative_h1(low, both) / relative_h1(high, both)
    assert ratio.item() == pytest.approx(np.sqrt(10 / 2), rel=1e-5)  # √((1 + 9) / (1 + 1))
    given = wanted.requires_grad_()
    Operators().loss(given, given.detach() + 1).backward()
    assert given.grad.isfinite().all()


# Operators


@pytest.mark.parametrize(("height", "width", "modes"), [(8, 7, 4), (9, 6, 3), (6, 4, 3)])
def test_spectral_layers_equal_sums_of_waves(height, width, modes):
    layer = SpectralConv2d(2, 3, modes).double()
    v = torch.randn(2, 2, height, width, dtype=torch.float64)
    seen = np.fft.fft2(v.numpy(), norm="forward")
    weight = torch.view_as_complex(layer.weight.detach()).numpy()
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    wanted = np.zeros((2, 3, height, width))
    for sign in (0, 1):
        for i in range(modes):
            p = i if sign == 0 else height - modes + i
            for q in range(modes):
                mixed = np.einsum("bi,io->bo", seen[:, :, p, q], weight[sign, :, :, i, q])
                wave = np.exp(2j * np.pi * (p * y / height + q * x / width))
                # columns from 0 stand for both signs, but for those that are their own mirror
                double = 1 if q == 0 or 2 * q == width else 2
                wanted += double * (mixed[..., None, None] * wave).real
    found = layer(v).detach().numpy()
    assert found == pytest.approx(wanted, abs=1e-12)


def test_spectral_layers_refuse_grids_with_fewer_waves():
    layer = SpectralConv2d(1, 1, 4)
    for shape in ((7, 16), (16, 5)):
        with pytest.raises(UsageError, match=rf"of 8 points per side, not {shape[0]}×{shape[1]}"):
            layer(torch.zeros(1, 1, *shape))
    assert layer(torch.zeros(1, 1, 8, 6)).shape == (1, 1, 8, 6)
    low = layer(torch.ones(1, 1, 8, 8, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16


def test_periodic_operators_commute_with_shifts_by_their_coarsest_cell():
    model = MgNO(16, 2, 3, 2, 4, LEVELS, padding_mode="circular", bias=True).double()
    model.fit_outputs(5 + 2 * torch.randn(4, 3, 16, 16))
    fields = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(fields).roll((4, 8), (2, 3))
        torch.testing.assert_close(model(fields.roll((4, 8), (2, 3))), wanted, rtol=0, atol=1e-11)
        other = model(fields.roll((1, 0), (2, 3)))
    assert (other - model(fields).roll((1, 0), (2, 3))).abs().max() > 1e-4


def test_outputs_are_scaled_and_added_to_the_input():
    plain = MgNO(8, 2, 2, 1, 4, LEVELS[1:]).double()
    change = MgNO(8, 2, 2, 1, 4, LEVELS[1:], add_input=True).double()
    change.load_state_dict(plain.state_dict())
    fields = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(change(fields), plain(fields) + fields)
    raw = plain(fields)
    wanted = torch.stack([torch.full((8, 8), 3.0), torch.randn(8, 8)]).expand(4, 2, 8, 8).double()
    plain.fit_outputs(wanted)
    assert plain.output_mean.flatten().tolist() == pytest.approx([3, wanted[0, 1].mean().item()])
    assert plain.output_std[0].item() == pytest.approx(1e-12)  # of a constant field
    deviation = wanted[0, 1].std(correction=0)
    torch.testing.assert_close(plain(fields)[:, 1], raw[:, 1] * deviation + wanted[0, 1].mean())
    torch.testing.assert_close(plain(fields)[:, 0], torch.full((3, 8, 8), 3.0).double())
    features = plain.forward_features(fields)
    assert plain.forward_head(features, pre_logits=True) is features


@pytest.mark.parametrize(
    "make", [lambda: MgNO(8, 1, 1, 1, 4, LEVELS[1:]), lambda: FNO2d(8, width=4, modes=2)]
)
def test_a_new_last_layer_has_the_type_of_the_network_and_no_scale(make):
    model = make().double()
    model.fit_outputs(torch.randn(3, 1, 8, 8))
    model.reset_classifier(3)
    found = model(torch.zeros(2, 1, 8, 8, dtype=torch.float64))
    assert (found.dtype, found.shape) == (torch.float64, (2, 3, 8, 8))
    assert (model.output_mean == 0).all()
    assert (model.output_std == 1).all()
    assert {name for name, _ in model.named_buffers()} >= {"output_mean", "output_std"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MgNO(8, activation="gelo"), "no activation 'gelo'"),
        (lambda: MgNO(8, 1, 1, 1, 4, LEVELS[1:], add_input=True).reset_classifier(2), "not 2 of 1"),
        (lambda: FNO2d(8, layers=0), "at least one layer, not 0"),
        (lambda: FNO2d(8, modes=2)(torch.zeros(1, 1, 9, 8)), "for grids of 8×8, not 9×8"),
        (lambda: FNO2d((8, 9), modes=2)(torch.zeros(1, 1, 9, 8)), "for grids of 8×9, not 9×8"),
        (lambda: MgNO(4, 1, 1, 1, 4, [(1, 0)] * 4), "at most"),
    ],
)
def test_impossible_operators_are_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_coordinates_are_rows_then_columns_from_0_to_1():
    model = FNO2d((4, 6), width=3, modes=2, layers=1)
    assert model.grid[0, :, 2].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert model.grid[1, 1].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert model(torch.zeros(2, 1, 4, 6)).shape == (2, 1, 4, 6)


# Pictures


def test_pictures_run_from_the_best_to_the_worst_field(tmp_path):
    """Rows of answers: differences are white where there are none, and coloured where there are."""
    fields = torch.rand(3, 1, 8, 8) + 1
    outputs = fields.clone()
    outputs[1] *= 1.5
    split = Split(fields, torch.arange(3), fields)
    Operators().draw(outputs, split, ["u"], tmp_path)
    draw_fields(fields[:1], fields[:1], outputs[:1], tmp_path / "best.png")
    draw_fields(fields[1:2], fields[1:2], outputs[1:2], tmp_path / "worst.png")
    colours = {}
    for name in ("best", "worst", "fields"):
        picture = Image.open(tmp_path / f"{name}.png").convert("RGB")
        pixels = np.asarray(picture).astype(int)
        last = pixels[:, int(0.75 * pixels.shape[1]) :]
        grey = (np.abs(last - 247).max(-1) < 3).sum()  # the middle of the colours
        colours[name] = grey / last[..., 0].size
    assert colours["best"] > 0.2
    assert colours["worst"] < 0.02
    assert colours["fields"] == pytest.approx(colours["best"] * 2 / 3, rel=0.2)  # two of three
