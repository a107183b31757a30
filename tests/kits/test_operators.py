"""Neural operators: the authors' outputs, solvers, generated fields, and runs."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import smallfry
from smallfry.cli import main
from smallfry.costing import cost
from smallfry.data import Split, load_data
from smallfry.errors import UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.operators.equations import gaussian_field, solve_darcy, solve_helmholtz
from smallfry.kits.operators.fields import (
    DarcySettings,
    HelmholtzSettings,
    darcy_sample,
    helmholtz_sample,
    usual_maximum,
)
from smallfry.kits.operators.models import FNO2d, MgNO, SpectralConv2d, checkpoint_filter_fn
from smallfry.kits.operators.pictures import draw_fields
from smallfry.kits.operators.task import Operators, relative_h1, relative_l2
from smallfry.layers.multigrid import MultigridConv2d
from smallfry.optim import KFAC
from smallfry.tasks import create_task
from smallfry_runtime.decoders.operators import decode
from smallfry_runtime.runtime import Runtime

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from zoo_golden import filled, images, series

GOLDEN = json.loads((Path(__file__).parent / "golden" / "operators.json").read_text())
THREE = [(1, 0), (1, 1), (2, 0)]
BUILT = {
    "mgconv_dc_6_3_res0": lambda: MultigridConv2d(3, 6, [(1, 1), (1, 1), (2, 0)], 16),
    "mgconv_dc_6_3_res1": lambda: MultigridConv2d(
        3, 6, [(1, 1), (1, 1), (2, 0)], 16, restrict_residual=True
    ),
    "mgno_dc_4x24_5levels_64": lambda: timm.create_model("mgno_darcy_5"),
    "mgno_small_dc_3x8_32": lambda: MgNO(32, 1, 1, 3, 8, THREE),
    "mgno_small_circular_2x8_16": lambda: MgNO(
        16, 1, 1, 2, 8, THREE, padding_mode="circular", transfer_periodic=False
    ),
}

load_kit("operators")


def authors_name(name: str) -> str:
    """Return the authors' name of one of our tensors, independently of the filter."""
    name = re.sub(r"up\.(\d+)\.transfer", r"RTlayers.\1", name)
    name = re.sub(r"post\.", "post_smooth_layer", name)
    name = name.replace("pre.0.", "layer0.")
    name = re.sub(r"pre\.(\d+)\.(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) + 1}", name)
    name = re.sub(r"down\.(\d+)", lambda m: f"layer{int(m[1]) + 1}.0", name)
    name = re.sub("^layers", "conv_list", name)
    return re.sub("^head", "linear", re.sub("^skips", "linear_list", name))


@pytest.mark.parametrize("name", BUILT)
def test_outputs_equal_the_authors(name):
    golden = GOLDEN["models"][name]
    model = BUILT[name]().double().eval()
    ours = {k: v for k, v in model.state_dict().items() if not k.startswith("output_")}
    given = {authors_name(k): filled(authors_name(k), v.shape) for k, v in ours.items()}
    assert model.load_state_dict(checkpoint_filter_fn(given, model), strict=False)[1] == []
    assert sum(p.numel() for p in model.parameters()) == golden["n_params"]
    with torch.no_grad():
        found = model(images(golden["input_shape"]))
    wanted = golden["output"]
    assert list(found.shape) == wanted["shape"]
    assert found.flatten()[:10].tolist() == pytest.approx(wanted["head"], abs=1e-9)
    assert found.sum().item() == pytest.approx(wanted["sum"], rel=1e-12)
    assert found.norm().item() == pytest.approx(wanted["l2"], rel=1e-12)


def test_periodic_prolongations_equal_the_reference():
    golden = GOLDEN["circular_fixed"]
    model = MultigridConv2d(1, 4, THREE, 32, "circular").double()
    given = {authors_name(k): v for k, v in model.state_dict().items()}
    given = {k: filled(k, v.shape) for k, v in given.items()}
    model.load_state_dict(checkpoint_filter_fn(given, model))
    with torch.no_grad():
        found = model(images((1, 1, 32, 32)))
    assert found.flatten()[:10].tolist() == pytest.approx(golden["head"], abs=1e-9)
    assert found.sum().item() == pytest.approx(golden["sum"], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("mgno_tiny", 1, 64_851),
        ("mgno_darcy_5", 1, 467_964),
        ("mgno_darcy", 1, 572_661),
        ("mgno_darcy_smooth", 1, 678_093),
        ("mgno_pipe", 2, 783_876),
        ("mgno_ns", 1, 2_885_194),
        ("fno_tiny", 1, 63_947),
    ],
)
def test_parameters(name, fields, count):
    model = timm.create_model(name, in_chans=fields)
    assert sum(p.numel() for p in model.parameters()) == count
    if name == "mgno_tiny":
        assert cost(model, torch.zeros(1, 1, 32, 32)).macs == pytest.approx(9.5e6, rel=0.02)


def test_spectral_layers_keep_low_waves_alone_and_commute_with_shifts():
    torch.manual_seed(0)
    layer = SpectralConv2d(1, 2, 4).double()
    x = torch.arange(16, dtype=torch.float64) * 2 * torch.pi / 16
    low = torch.cos(3 * x)[None, None, None].expand(1, 1, 16, 16)
    high = torch.cos(6 * x)[None, None, None].expand(1, 1, 16, 16)
    with torch.no_grad():
        assert layer(low).abs().max() > 1e-3
        assert layer(high).abs().max() < 1e-12
        noise = torch.randn(1, 1, 16, 16, dtype=torch.float64)
        shifted = layer(noise.roll((3, 5), (2, 3)))
        torch.testing.assert_close(shifted, layer(noise).roll((3, 5), (2, 3)), rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="grid of 8 points per side, not 6×6"):
        layer(torch.zeros(1, 1, 6, 6, dtype=torch.float64))


def test_the_scale_of_outputs_is_that_of_training_fields():
    torch.manual_seed(0)
    fields = 3 + 0.5 * torch.randn(20, 1, 32, 32)
    model = FNO2d()
    model.fit_outputs(fields)
    assert model.output_mean.item() == pytest.approx(fields.mean().item(), rel=1e-6)
    assert model.output_std.item() == pytest.approx(fields.std(correction=0).item(), rel=1e-5)
    model.reset_classifier(2)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 2, 32, 32)
    with pytest.raises(UsageError, match="at least one layer"):
        MgNO(layers=0)
    with pytest.raises(UsageError, match="as many fields out as in"):
        MgNO(in_chans=2, add_input=True)


# Equations


def test_darcys_golden_and_its_order():
    pde = GOLDEN["pde"]
    a = np.where(series("darcy", 289).numpy().reshape(17, 17) >= 0, 12.0, 3.0)
    u = solve_darcy(a)
    assert u[8] == pytest.approx(pde["darcy_17"]["row8"], abs=1e-12)
    assert u.sum() == pytest.approx(pde["darcy_17"]["sum"], rel=1e-12)
    assert solve_darcy(np.ones((65, 65)))[32, 32] == pytest.approx(pde["poisson_65_centre"])
    errors = []
    for n in (17, 33, 65):
        y, x = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n), indexing="ij")
        exact = np.sin(np.pi * x) * np.sin(np.pi * y)
        f = 2 * np.pi**2 * (1 + x + y / 2) * exact
        f -= np.pi * np.cos(np.pi * x) * np.sin(np.pi * y)
        f -= np.pi / 2 * np.sin(np.pi * x) * np.cos(np.pi * y)
        errors.append(np.abs(solve_darcy(1 + x + y / 2, f) - exact).max())
    assert errors == pytest.approx([pde["darcy_errors"][str(n)] for n in (17, 33, 65)], rel=1e-6)
    assert np.log2(np.array(errors[:-1]) / errors[1:]) == pytest.approx([2, 2], abs=0.1)


def test_helmholtzs_golden_and_its_order():
    pde, k = GOLDEN["pde"], 7.3
    root = np.sqrt(k**2 - np.pi**2)
    errors = []
    for n in (17, 33, 65):
        u = solve_helmholtz(np.full((n, n), k), lambda x: np.cos(np.pi * x))
        y, x = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n), indexing="ij")
        exact = np.cos(np.pi * x) * np.cos(root * y) / (-root * np.sin(root))
        errors.append(np.abs(u - exact).max() / np.abs(exact).max())
        if n == 17:
            assert u[16] == pytest.approx(pde["helmholtz_17_k7.3"]["row16"], abs=1e-11)
            assert np.linalg.norm(u) == pytest.approx(pde["helmholtz_17_k7.3"]["l2"], rel=1e-11)
    wanted = [pde["helmholtz_errors"][str(n)] for n in (17, 33, 65)]
    assert errors == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="at the nodes"):
        solve_helmholtz(7.3, np.cos)


def test_gaussian_fields():
    field = gaussian_field(np.random.default_rng(0), 33)
    golden = GOLDEN["pde"]["grf_33_alpha2_tau3_numpy_seed0"]
    assert field.ravel()[:5] == pytest.approx(golden["head"], rel=1e-12)
    assert field.std() == pytest.approx(golden["std"], rel=1e-12)
    assert abs(field.mean()) < 1e-12


# Data


def test_samples_depend_on_settings_split_and_number_alone():
    settings = DarcySettings(size=8)
    a, u = darcy_sample(settings, "train", 3)
    again = darcy_sample(settings, "train", 3)
    assert np.array_equal(a, again[0])
    assert np.array_equal(u, again[1])
    assert {*np.unique(a)} <= {3.0, 12.0}
    for other in (
        darcy_sample(settings, "test", 3),
        darcy_sample(settings, "train", 4),
        darcy_sample(DarcySettings(size=8, seed=1), "train", 3),
    ):
        assert not np.array_equal(u, other[1])
    smooth, _ = darcy_sample(DarcySettings(size=8, coefficient="log-normal"), "train", 3)
    assert len(np.unique(smooth)) > 50
    assert u[0, 0].max() == 0
    assert u[0, :, 0].max() == 0


def test_waves_near_resonance_are_left_out():
    settings = HelmholtzSettings(size=9)
    usual = usual_maximum(settings)
    for number in range(20):
        k, u, _ = helmholtz_sample(settings, "train", number, 2 * usual)
        assert np.abs(u).max() <= 2 * usual
        assert 4 <= k.min() <= k.max() <= 12
    left_out = [helmholtz_sample(settings, "train", i, usual)[2] for i in range(20)]
    assert sum(left_out) > 0


@pytest.mark.parametrize("name", ["operators-darcy", "operators-helmholtz"])
def test_data_sets_have_their_splits(name):
    data = load_data(name, options={"samples": 30, "size": 9}, test=0.2, validation=0.25)
    assert [len(data.train), len(data.validation), data.test_count] == [18, 6, 6]
    assert data.train.images.dtype == data.train.labels.dtype == torch.float32
    assert data.input_shape == (1, 9, 9)
    assert data.generated["family"] == name
    again = load_data(name, options={"samples": 30, "size": 9}, test=0.2, validation=0.25)
    assert again.fingerprint == data.fingerprint
    assert len(load_data(name, options={"samples": 30, "size": 9}, limit=5).train) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"samples": 3}}, "samples is 10 to"),
        ({"options": {"size": 4}}, "size is 8 to 512"),
        ({"options": {"coefficient": "three"}}, "two or log-normal"),
        ({"options": {"low": 12.0}}, "below high"),
        ({"options": {"sizes": 4}}, "no 'sizes'; did you mean 'size'"),
        ({"root": "."}, "is generated"),
        ({"image_size": 16}, "no data.image_size"),
    ],
)
def test_impossible_data_is_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        load_data("operators-darcy", **settings)


def test_impossible_waves_are_refused():
    with pytest.raises(UsageError, match="below base"):
        load_data("operators-helmholtz", options={"spread": 9.0})


# Task


def test_errors_have_the_authors_values():
    found, wanted = (images((2, 1, 48, 48), name) for name in ("prediction", "target"))
    pde = GOLDEN["pde"]
    assert relative_h1(found, wanted).tolist() == pytest.approx(pde["h1_48"], rel=1e-8)
    assert relative_l2(found, wanted).tolist() == pytest.approx(pde["l2_48"], rel=1e-10)
    whole = relative_h1(found, wanted, cut=1000)
    assert not torch.allclose(whole, relative_h1(found, wanted))
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(relative_h1(noise, noise), torch.zeros(3, dtype=torch.float64))


def test_scores_and_refusals():
    task = Operators()
    fields = torch.rand(4, 1, 8, 8) + 1
    scores = task.metrics(fields * 1.04, fields)
    assert scores["l2_error"] == pytest.approx(0.04, rel=1e-5)
    assert scores["worst_l2_error"] == pytest.approx(0.04, rel=1e-5)
    assert scores["accuracy"] == 1
    assert task.metrics(fields * 1.06, fields)["accuracy"] == 0
    assert task.rank({"l2_error": 0.1}) > task.rank({"l2_error": 0.2})
    assert task.loss(fields, fields).item() == 0
    assert task.right(fields, fields).all()
    with pytest.raises(UsageError, match="leave out label_smoothing"):
        create_task("operators", 0.1)
    with pytest.raises(UsageError, match="fields to learn"):
        task.targets(torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1))


def test_decoding():
    fields = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2) / 3
    first, second = decode(fields, ["field"])
    assert first["maximum"] == pytest.approx(1)
    assert second["fields"]["field"] == [[1.333333, 1.666667], [2.0, 2.333333]]
    with pytest.raises(UsageError, match="no setting 'beam'"):
        decode(fields, ["field"], {"beam": 3})
    assert decode((fields + 1) * np.inf, ["field"])[1]["maximum"] == np.inf


def test_pictures(tmp_path):
    fields = torch.rand(6, 1, 8, 8) + 1
    draw_fields(fields[:2], fields[:2], fields[:2], tmp_path / "two.png")
    Operators().draw(fields * 1.1, Split(fields, torch.arange(6), fields), ["field"], tmp_path)
    sizes = [Image.open(tmp_path / name).size for name in ("two.png", "fields.png")]
    assert sizes[1] == (sizes[0][0], 2 * sizes[0][1])  # four rows of samples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a little on small fields."""
    folder = tmp_path_factory.mktemp("operators") / "run"
    options = {"samples": 60, "size": 16}
    code = main(
        [
            *("train", "--task", "operators", "--data.options", json.dumps(options)),
            *("--model.options", "{iterations: [[1, 0], [1, 0], [2, 0]], layers: 2}"),
            *("--epochs", "25", "--batch_size", "4", "--run", str(folder), "--threads", "1"),
        ]
    )
    assert code == 0
    return folder


@pytest.mark.slow
def test_a_run_beats_the_mean_field_and_draws(run):
    trained = smallfry.load(run)
    options = {"samples": 60, "size": 16}
    data = load_data("operators-darcy", options=options)
    mean = data.train.labels.mean(0, keepdim=True).expand(len(data.test), -1, -1, -1)
    baseline = relative_l2(mean, data.test.labels).mean().item()
    assert trained.evaluate()["l2_error"] < 0.8 * baseline


@pytest.mark.slow
def test_an_export_answers_with_fields(run, tmp_path, capsys):
    smallfry.export(run, tmp_path / "export")
    runtime = Runtime(tmp_path / "export")
    data = load_data("operators-darcy", options={"samples": 60, "size": 16})
    pixels = data.test.images.numpy()
    with torch.no_grad():
        trained = smallfry.load(run)
        wanted = trained.model(trained.normalize(data.test.images))
    assert np.abs(runtime.compute(pixels).logits - wanted.numpy()).max() < 1e-5 * wanted.abs().max()
    np.save(tmp_path / "a.npy", pixels[0])
    assert main(["predict", str(tmp_path / "export"), str(tmp_path / "a.npy"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["maximum"] == pytest.approx(wanted[0].max().item(), rel=1e-4)


def test_natural_gradient_covers_every_convolution():
    model = MgNO(16, 1, 1, 2, 4, [(1, 0), (2, 0)])
    optimizer = KFAC(model, lr=0.1, likelihood="gaussian_mean")
    fields, wanted = torch.randn(8, 1, 16, 16), torch.randn(8, 1, 16, 16)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(fields), wanted).backward()
        optimizer.step()
    assert not optimizer.uncovered
