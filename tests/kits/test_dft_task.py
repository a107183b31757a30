"""Densities from data to starts of calculations: molecules, labels, scores, and runs."""

import json

import numpy as np
import pytest

pytest.importorskip("pyscf", reason="PySCF, of the extra dft, is not installed")
pytest.importorskip("e3nn", reason="e3nn, of the extra dft, is not installed")
pytest.importorskip("ase", reason="ase, of the extra dft, is not installed")

import torch
from PIL import Image
from pyscf import dft, gto

import smallfry
from smallfry.cli import main
from smallfry.data import Split, load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.dft import DensityGuess
from smallfry.kits.dft import data as data_module
from smallfry.kits.dft.__main__ import main as convert
from smallfry.kits.dft.data import DensitySettings, density_of, kept_at, molecules_of, rows_of
from smallfry.kits.dft.density import charges, coefficients, metric
from smallfry.kits.dft.layout import WIDTH, functions_of, to_coefficients, to_places
from smallfry.kits.dft.models import DensityNet
from smallfry.kits.dft.molecules import Molecule, g2_molecules, read_xyz, shaken
from smallfry.kits.dft.pictures import density_on_plane
from smallfry.kits.dft.task import DensityCoefficients
from smallfry.optim import KFAC
from smallfry.tasks import create_task

OPTIONS = {"largest": 2, "copies": 2, "atoms": 3}  # H2, CO and N2
WATER = "3\nwater\nO 0 0 0.1192\nH 0 0.7632 -0.4770\n1 0 -0.7632 -0.4770 extra\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Keep densities in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLFRY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """Train a little on carbon monoxide of three bond lengths, of which one is held out."""
    folder = tmp_path_factory.mktemp("dft")
    for number, distance in enumerate((1.08, 1.13, 1.18)):
        (folder / f"{number}.xyz").write_text(f"2\n\nC 0 0 0\nO 0 0 {distance}\n")
    code = main(
        [
            *("train", "--task", "dft", "--data", "dft-xyz", "--data.root", str(folder)),
            *("--data.options", json.dumps({**OPTIONS, "copies": 1})),
            *("--model.options", "{elements: [6, 8]}", "--data.test", "0.34"),
            *("--epochs", "40", "--batch_size", "2", "--run", str(folder / "run")),
            *("--threads", "1"),
        ]
    )
    assert code == 0
    return folder / "run"


# Molecules


def test_g2_has_61_closed_shells_and_the_recipe_holds_15_out():
    found = {each.name: each for each in g2_molecules()}
    assert len(found) == 61
    assert sorted(found["CH3OH"].numbers.tolist()) == [1, 1, 1, 1, 6, 8]
    assert "CH2_s1A1d" in found
    assert not {"CH2_s3B1d", "O2", "OH", "LiF"} & {*found}
    parts = molecules_of([*found.values()], 0.25, 0.0, 0)
    assert [len(parts[name]) for name in ("test", "validation", "train")] == [15, 0, 46]
    assert sorted(n for part in parts.values() for n in part) == [*range(61)]
    assert molecules_of([*found.values()], 0.25, 0.0, 1) != parts
    assert len(molecules_of([*found.values()], 0.25, 0.1, 0)["validation"]) == 5


def test_files_of_molecules(tmp_path, capsys):
    file = tmp_path / "water.xyz"
    file.write_text(WATER)
    water = read_xyz(file)
    assert (water.name, water.numbers.tolist()) == ("water", [8, 1, 1])
    assert water.positions[0, 2] == pytest.approx(0.1192 / 0.529177, rel=1e-5)
    convert([str(file), "--atoms", "4"])
    rows = np.load(tmp_path / "water.npy")
    assert rows.shape == (1, 4, 4)
    assert rows[0, :, 0].tolist() == [8, 1, 1, 0]
    assert rows[0, :3, 1:] == pytest.approx(water.positions)
    assert "water.npy" in capsys.readouterr().out
    with pytest.raises(DataError, match="3 atoms, and there are 2 rows"):
        rows_of(water, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "can't be read as a molecule"),
        ("2\n\nH 0 0 0\n", "has 1 atoms of 2"),
        ("1\n\nXx 0 0 0\n", "can't be read as a molecule"),
        ("2\n\nH 0 0 0\nH 0 0\n", "can't be read as a molecule|has 2 atoms"),
        ("2\n\nH 0 0 0\nO 0 0 1\n", "9 electrons are no closed shell"),
        ("2\n\nH 0 0 0\nH 0 0 0.1\n", "less than 0.5 bohr apart"),
        ("2\n\nH 0 0 0\nH 0 0 nan\n", "has 2 atoms of 2"),
    ],
)
def test_other_files_are_refused(tmp_path, text, words):
    (tmp_path / "wrong.xyz").write_text(text)
    with pytest.raises(DataError, match=words):
        read_xyz(tmp_path / "wrong.xyz")


def test_shaken_geometries():
    water = {each.name: each for each in g2_molecules()}["H2O"]
    found = [shaken(water, 0.08, np.random.default_rng(i)).positions for i in range(200)]
    moved = np.stack(found) - water.positions
    assert moved.std() == pytest.approx(0.08, rel=0.05)
    assert abs(moved.mean()) < 0.01
    assert (np.stack(found) == np.stack(found).astype(np.float32)).all()


# Data


def test_labels_are_fits_of_pyscfs_densities_and_kept(cache, monkeypatch):
    hydrogen = {each.name: each for each in g2_molecules()}["H2"]
    found = density_of(hydrogen)
    functions = functions_of(hydrogen.numbers, hydrogen.positions)
    assert charges(functions) @ found == pytest.approx(2, abs=1e-9)
    atoms = [("H", place) for place in hydrogen.positions.tolist()]
    calculation = dft.RKS(gto.M(atom=atoms, basis="def2-svp", unit="Bohr", verbose=0), xc="pbe")
    calculation.grids.level = 2
    assert found == pytest.approx(coefficients(calculation.run()), abs=1e-5)
    rough = density_of(hydrogen, exact=False)
    assert (rough - found) @ metric(functions) @ (rough - found) < 1e-7
    assert kept_at(hydrogen) != kept_at(hydrogen, exact=False)
    monkeypatch.setattr(data_module, "coefficients", None)  # not computed again
    assert np.array_equal(density_of(hydrogen), found)


def test_the_data_set_and_its_splits(cache):
    data = load_data("dft-g2", options=OPTIONS, test=0.34, validation=0.0)
    assert [len(data.train), len(data.validation), len(data.test)] == [6, 1, 1]
    assert data.input_shape == (1, 3, 4)
    assert (data.mean, data.std) == ((0.0,), (1.0,))
    rows, labels = data.train.images, data.train.labels
    assert torch.equal(labels[..., :4], rows[:, 0])
    assert (labels[:, 2] == 0).all()  # a row without an atom
    assert torch.equal(rows[0, 0, :, 0], rows[1, 0, :, 0])  # a copy
    assert 0 < (rows[0] - rows[1]).abs().max() < 0.5
    numbers, positions = rows[0, 0, :2, 0].long().numpy(), rows[0, 0, :2, 1:].double().numpy()
    found = to_coefficients(numbers, labels[0, :2, 4:].numpy())
    electrons = charges(functions_of(numbers, positions)) @ found
    assert electrons == pytest.approx(numbers.sum(), abs=1e-4)
    again = load_data("dft-g2", options=OPTIONS, test=0.34, validation=0.0)
    assert again.fingerprint == data.fingerprint
    other = load_data("dft-g2", options={**OPTIONS, "seed": 1}, test=0.34, validation=0.0)
    assert other.fingerprint != data.fingerprint
    held = load_data("dft-g2", options=OPTIONS, test=0.34, validation=0.5)
    assert [len(held.train), len(held.validation), len(held.test)] == [3, 1, 1]


def test_molecules_of_a_folder(cache, tmp_path):
    for number, distance in enumerate((0.70, 0.74, 0.80)):
        (tmp_path / f"{number}.xyz").write_text(f"2\n\nH 0 0 0\nH 0 0 {distance}\n")
    options = {"copies": 0, "atoms": 2, "largest": 2}
    data = load_data("dft-xyz", tmp_path, options=options, test=0.34, validation=0.0)
    assert [len(data.train), len(data.validation), len(data.test)] == [2, 1, 1]
    with pytest.raises(DataError, match=r"no \.xyz files"):
        load_data("dft-xyz", tmp_path / "none", options=options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"copies": -1}}, "copies is 0 to 100"),
        ({"options": {"width": 1.0}}, "above 0, to 0.5 bohr"),
        ({"options": {"largest": 17}}, "largest is 2 to atoms"),
        ({"options": {"copy": 1}}, "no 'copy'; did you mean 'copies'"),
        ({"root": "."}, "does not use data.root"),
        ({"image_size": 16}, "no data.image_size"),
        ({"name": "dft-xyz"}, "needs the folder"),
    ],
)
def test_impossible_data_is_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        load_data(**{"name": "dft-g2", **settings})


def test_too_few_molecules_are_refused():
    with pytest.raises(DataError, match="3 molecules of at most 2 atoms are too few"):
        load_data("dft-g2", options=OPTIONS, test=0.1)


def test_geometries_that_do_not_converge_are_drawn_anew(monkeypatch):
    hydrogen = {each.name: each for each in g2_molecules()}["H2"]
    seen = []

    def fails(given, exact=True):
        seen.append(given.positions)
        if len(seen) < 3:
            raise UsageError("has not converged")
        return np.zeros(3)

    monkeypatch.setattr(data_module, "density_of", fails)
    found = data_module._shaken(hydrogen, DensitySettings(), (0, 1))
    assert np.array_equal(found.positions, seen[2])
    assert not np.array_equal(seen[0], seen[1])
    seen.clear()
    monkeypatch.setattr(data_module, "density_of", fail)
    with pytest.raises(DataError, match="5 shaken geometries did not converge"):
        data_module._shaken(hydrogen, DensitySettings(), (0, 1))


def fail(given, exact=True):
    """Fail as a calculation that does not converge."""
    raise UsageError("has not converged")


# Task


def drawn(count=3, atoms=4):
    """Draw labels of molecules with a row without an atom, and outputs with errors."""
    random = torch.Generator().manual_seed(0)
    labels = torch.zeros(count, atoms, 4 + WIDTH)
    labels[:, :3, 0] = torch.tensor([8.0, 1.0, 1.0])
    labels[:, :3, 1:4] = 3 * torch.eye(3) + 0.3 * torch.randn(count, 3, 3, generator=random)
    labels[:, :3, 4:] = torch.randn(count, 3, WIDTH, generator=random)
    outputs = torch.cat([labels[..., :1], labels[..., 4:]], dim=2)
    outputs[:, :, 1:] += 0.1 * torch.randn(count, atoms, WIDTH, generator=random)
    return outputs, labels


def test_the_loss_is_the_coulomb_energy_of_the_error():
    outputs, labels = drawn()
    found = DensityCoefficients().losses(outputs.double(), labels.double())
    for energy, output, label in zip(found, outputs.double(), labels.double(), strict=True):
        numbers, positions = label[:3, 0].long().numpy(), label[:3, 1:4].numpy()
        wrong = to_coefficients(numbers, (output[:3, 1:] - label[:3, 4:]).numpy())
        wanted = wrong @ metric(functions_of(numbers, positions)) @ wrong / 10
        assert energy.item() == pytest.approx(wanted, rel=1e-9)
    outputs.requires_grad_()
    DensityCoefficients().loss(outputs, labels).backward()
    assert (outputs.grad[:, 3] == 0).all()  # no atom
    assert (outputs.grad[:, 1, 4:7] == 0).all()  # places that hydrogen has not
    assert outputs.grad[:, 0, 1:].abs().min() > 0


def test_scores_and_refusals():
    task = DensityCoefficients()
    outputs, labels = drawn()
    right = torch.cat([labels[..., :1], labels[..., 4:]], dim=2)
    outputs[0] = right[0]
    scores = task.metrics(outputs, labels)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["density_error"] == scores["loss"] > 0
    assert scores["worst_density_error"] == pytest.approx(
        task.losses(outputs.double(), labels.double()).max().item()
    )
    assert task.metrics(right, labels)["loss"] == 0
    assert task.rank({"density_error": 0.1}) > task.rank({"density_error": 0.2})
    with pytest.raises(UsageError, match="leave out label_smoothing"):
        create_task("dft", 0.1)
    with pytest.raises(UsageError, match="needs molecules to learn"):
        task.targets(torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1))


def test_answers_are_in_pyscfs_order():
    outputs, _ = drawn(1)
    (found,) = DensityCoefficients().decode(outputs, ())
    assert found["molecule"] == "O H H"
    values = np.concatenate([each["coefficients"] for each in found["atoms"]])
    places = to_places(np.array([8, 1, 1]), values)
    wanted = outputs[0, :3, 1:].numpy()
    used = places != 0
    assert used.sum() == 49 + 11 + 11
    assert places[used] == pytest.approx(wanted[used], rel=1e-4, abs=1e-4)
    with pytest.raises(UsageError, match="no setting 'beam'"):
        DensityCoefficients().decode(outputs, (), {"beam": 3})


def test_pictures(tmp_path):
    outputs, labels = drawn(4)
    split = Split(labels[:, None, :, :4], torch.arange(4), labels)
    DensityCoefficients().draw(outputs, split, (), tmp_path)
    width, height = Image.open(tmp_path / "densities.png").size
    assert width > 500
    assert height > 0.8 * width  # three rows
    numbers, positions = np.array([1, 1]), np.array([[0, 0, -0.7], [0, 0, 0.7]])
    places = np.zeros((2, WIDTH))
    places[0, 0] = 1
    shown = density_on_plane(numbers, positions, places, 3.0)
    row, column = np.unravel_index(np.abs(shown).argmax(), shown.shape)
    assert (abs(row - 40), abs(column - 40)) in ((0, 9), (9, 0), (0, 10), (10, 0))  # at −0.7


# Runs


@pytest.mark.slow
def test_a_run_learns_and_answers(run, tmp_path, capsys):
    trained, task = smallfry.load(run), DensityCoefficients()
    options = {**OPTIONS, "copies": 1}
    data = load_data("dft-xyz", run.parent, options=options, test=0.34, validation=0.0)
    with torch.no_grad():
        learnt = task.losses(trained.model(data.test.images), data.test.labels).mean().item()
        assert trained.evaluate()["density_error"] == pytest.approx(learnt, rel=1e-3)
        np.save(tmp_path / "a.npy", data.test.images[0].numpy())
        for parameter in trained.model.heads.parameters():
            parameter.zero_()
        means = task.losses(trained.model(data.test.images), data.test.labels).mean().item()
    assert learnt < 0.2 * means
    assert main(["predict", str(run), str(tmp_path / "a.npy"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.dumps(answer).count('"element"') == 2


@pytest.mark.slow
def test_a_start_from_a_network_ends_at_the_same_energy(run):
    guess = DensityGuess.load(run)
    molecule = gto.M(atom="C 0 0 0; O 0 0 1.13", basis="6-31g", verbose=0)
    found = guess.coefficients(molecule)
    assert charges(functions_of(np.array([6, 8]), molecule.atom_coords())) @ found == pytest.approx(
        14, abs=1e-8
    )
    for functional in ("pbe", "b3lyp"):
        plain = dft.RKS(molecule, xc=functional)
        plain.conv_tol = 1e-10
        other = plain.copy()
        plain.kernel()
        matrix = guess.density_matrix(other)
        assert np.trace(matrix @ molecule.intor("int1e_ovlp")) == pytest.approx(14, abs=1e-8)
        other.kernel(dm0=matrix)
        assert other.e_tot == pytest.approx(plain.e_tot, abs=1e-8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"atom": "H 0 0 0; F 0 0 0.9"}, "has not learnt F, only H, C, N, O"),
        ({"atom": "O 0 0 0; H 0 0 0.9", "charge": -1}, "neutral molecules .* charge -1"),
        ({"atom": "H 0 0 0; H 0 0 0.7; GHOST-H 0 0 3"}, r"nuclei \[1, 1, 0\]"),
        ({"atom": "O 0 0 0; O 0 0 1.2", "spin": 2}, "2 unpaired electrons"),
    ],
)
def test_molecules_that_it_has_not_learnt_are_refused(settings, words):
    guess = DensityGuess(DensityNet().eval())
    molecule = gto.M(basis="6-31g", verbose=0, **settings)
    calculation = dft.ROKS(molecule) if molecule.spin else dft.RKS(molecule)
    with pytest.raises(UsageError, match=words):
        guess.density_matrix(calculation)


def test_runs_of_other_models_are_refused(monkeypatch):
    class Other:
        model = torch.nn.Linear(1, 1)

    monkeypatch.setattr(smallfry, "load", lambda run: Other)
    with pytest.raises(UsageError, match="holds Linear, not a density network"):
        DensityGuess.load("runs/other")


def test_molecules_of_odd_electrons_are_refused():
    with pytest.raises(DataError, match="9 electrons"):
        Molecule("radical", np.array([8, 1]), np.array([[0.0, 0, 0], [0, 0, 1.8]]))


def test_natural_gradient_covers_every_layer(cache):
    torch.manual_seed(0)
    data = load_data("dft-g2", options=OPTIONS, test=0.34, validation=0.0)
    model = DensityNet()
    optimizer = KFAC(model, lr=0.05, likelihood="gaussian_mean")
    for _ in range(3):
        optimizer.zero_grad()
        DensityCoefficients().loss(model(data.train.images), data.train.labels).backward()
        optimizer.step()
    assert not optimizer.uncovered
