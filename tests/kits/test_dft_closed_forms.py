"""Densities against closed forms and symmetries, molecules in odd files, and a damaged cache."""

import numpy as np
import pytest

pytest.importorskip("pyscf", reason="PySCF, of the extra dft, is not installed")
pytest.importorskip("e3nn", reason="e3nn, of the extra dft, is not installed")

import torch
from pyscf import dft, gto
from scipy.spatial.transform import Rotation

from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.dft import data as data_module
from smallfry.kits.dft.__main__ import main as convert
from smallfry.kits.dft.data import density_of, kept_at, molecules_of, rows_of, tuple_of
from smallfry.kits.dft.density import auxiliary, charges, constrained, fit, fock, metric, start
from smallfry.kits.dft.layout import (
    WIDTH,
    active,
    functions_of,
    names_of,
    symbol_of,
    to_coefficients,
    to_places,
    whitened_metric,
)
from smallfry.kits.dft.models import DensityNet
from smallfry.kits.dft.molecules import Molecule, read_xyz, shaken
from smallfry.kits.dft.pictures import density_on_plane, plane_of
from smallfry.kits.dft.task import DensityCoefficients

WATER = np.array([8, 1, 1]), np.array([[0.0, 0, 0.2], [0, 1.4, -0.9], [0, -1.4, -0.9]])


# Functions


def test_distant_densities_repel_as_points():
    """Far apart, the energies of s functions are those of their charges, q q' / R."""
    places = np.array([[0.0, 0, 0], [30.0, 40.0, 0]])  # bohr
    functions = functions_of(np.array([1, 6]), places)
    q, energies = charges(functions), metric(functions)
    split = functions_of(np.array([1]), np.zeros((1, 3))).nao
    round_ = np.flatnonzero(q)
    own, other = round_[round_ < split], round_[round_ >= split]
    wanted = np.outer(q[own], q[other]) / 50
    assert energies[np.ix_(own, other)] == pytest.approx(wanted, rel=1e-10)
    assert len(own) == 3
    assert len(other) == 6
    assert np.linalg.eigvalsh(energies).min() > 0


def test_energies_do_not_change_when_all_atoms_move():
    numbers, positions = WATER
    moved = Rotation.from_euler("xyz", [1.0, 0.4, -2.0]).apply(positions) + np.array(
        [3.0, -1.0, 0.5]
    )
    before, after = (whitened_metric(numbers, each) for each in (positions, moved))
    assert np.linalg.eigvalsh(after) == pytest.approx(np.linalg.eigvalsh(before), abs=1e-9)
    order = [1, 2, 0]
    swapped = whitened_metric(numbers[order], positions[order])
    assert np.linalg.eigvalsh(swapped) == pytest.approx(np.linalg.eigvalsh(before), abs=1e-9)
    own = slice(0, 49)
    assert before[own, own] == pytest.approx(np.eye(49), abs=1e-9)


def test_places_and_coefficients_are_each_others_inverse():
    numbers = np.array([6, 1, 7, 8])
    places = np.zeros((4, WIDTH))
    used = active(numbers)
    places.ravel()[used] = np.random.default_rng(0).normal(size=len(used))
    assert len({*used.tolist()}) == len(used) == 49 * 3 + 11
    again = to_places(numbers, to_coefficients(numbers, places))
    assert again == pytest.approx(places, abs=1e-11)
    parts = [to_coefficients(numbers[i : i + 1], places[i : i + 1]) for i in range(4)]
    assert np.concatenate(parts) == pytest.approx(to_coefficients(numbers, places), abs=1e-14)
    one = places.astype(np.float32)
    assert to_coefficients(numbers, one).dtype == np.float64


@pytest.fixture(scope="module")
def hydrogen():
    """Set up hydrogen without a functional, so that its Fock matrix is linear in the density."""
    molecule = gto.M(atom="H 0 0 0; H 0 0 1.4", unit="Bohr", basis="sto-3g", verbose=0)
    found = dft.RKS(molecule, xc="0*lda,")
    found.grids.level = 0
    return found


def test_coulomb_matrices_are_linear_and_those_of_a_distant_charge(hydrogen):
    functions = auxiliary(hydrogen.mol)
    one, two = np.random.default_rng(0).normal(size=(2, functions.nao))
    core = hydrogen.get_hcore()
    first, second, both = (fock(hydrogen, c) - core for c in (one, two, one - 2 * two))
    assert both == pytest.approx(first - 2 * second, abs=1e-10)
    assert first == pytest.approx(first.T, abs=1e-12)
    matrix = np.array([[0.4, 0.1], [0.1, 0.7]])
    # the energy of a fit with its own density is that of the integrals (fit|matrix)
    fitted = fit(hydrogen.mol, matrix)
    energy = fitted @ metric(functions) @ fitted
    assert np.sum((fock(hydrogen, fitted) - core) * matrix) == pytest.approx(energy, rel=1e-10)
    assert fit(hydrogen.mol, -3 * matrix) == pytest.approx(-3 * fitted, rel=1e-9, abs=1e-12)


def test_starts_have_the_electrons_of_their_orbitals(hydrogen):
    functions = auxiliary(hydrogen.mol)
    found = start(hydrogen, constrained(np.zeros(functions.nao), functions, 2))
    overlap = hydrogen.get_ovlp()
    assert np.trace(found @ overlap) == pytest.approx(2, abs=1e-12)
    assert found @ overlap @ found == pytest.approx(2 * found, abs=1e-12)  # idempotent
    for wrong in (np.zeros(functions.nao + 1), np.zeros((functions.nao, 1)), np.float64(1)):
        with pytest.raises(UsageError, match=f"has {functions.nao} coefficients"):
            fock(hydrogen, wrong)


def test_constraints_that_hold_change_nothing():
    functions = functions_of(*WATER)
    drawn = np.random.default_rng(0).normal(size=functions.nao)
    q = charges(functions)
    for electrons in (10.0, 0.0, -2.5):
        found = constrained(drawn, functions, electrons)
        assert q @ found == pytest.approx(electrons, abs=1e-10)
        assert constrained(found, functions, electrons) == pytest.approx(found, abs=1e-10)
        # no other change with this charge has less energy
        other = found + np.eye(functions.nao)[7] * 0.1  # a p function
        energies = [(each - drawn) @ metric(functions) @ (each - drawn) for each in (found, other)]
        assert energies[0] < energies[1]


# Molecules


@pytest.mark.parametrize(
    "text",
    [
        "2\n\nH 0 0 0\nh 0 0 0.74\n",
        "2\r\nhydrogen\r\n1 0 0 0\r\nH 0 0 7.4e-1 0.3\r\n",
        "  2  \n\nH 0 0 0\nH 0 0 0.74\nHe 0 0 9\nno more\n",
    ],
)
def test_files_of_unusual_but_legal_form(text, tmp_path):
    (tmp_path / "a.b.xyz").write_text(text, newline="")
    found = read_xyz(tmp_path / "a.b.xyz")
    assert found.name == "a.b"
    assert found.numbers.tolist() == [1, 1]
    assert found.positions[1, 2] == pytest.approx(0.74 / 0.529177, rel=1e-5)
    assert (found.positions == found.positions.astype(np.float32)).all()
    assert found.atoms()[0] == ("H", (0.0, 0.0, 0.0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"2\n\n0 0 0 0\n0 0 0 1\n", "can't be read as a molecule"),
        (b"1\n\n119 0 0 0\n", "can't be read as a molecule"),
        (b"1\n\nX 0 0 0\n", "can't be read as a molecule"),
        (b"1\n\n-8 0 0 0\n", "can't be read as a molecule"),
        ("1\n\n² 0 0 0\n".encode(), "can't be read as a molecule"),
        (b"2\n\nH 0 0 0\nH 0 0 1e300\n", "has 2 atoms of 2"),
        (b"2\n\nH 0 0 0\nH 0 0 inf\n", "has 2 atoms of 2"),
        (b"-1\n\nH 0 0 0\n", "atoms of -1"),
        (b"0\n\n", "has 0 atoms of 0"),
        (b"2.0\n\nH 0 0 0\nH 0 0 1\n", "can't be read as a molecule"),
        (b"\xff\xfe2\n", "can't be read as a molecule"),
        (b"2\n\nH 0 0 0\n\n", "can't be read as a molecule"),
    ],
)
def test_files_of_no_molecule_are_refused(content, words, tmp_path):
    (tmp_path / "a.xyz").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_xyz(tmp_path / "a.xyz")
    with pytest.raises(DataError, match="can't be read as a molecule"):
        read_xyz(tmp_path)  # a folder


def test_the_command_ends_with_what_it_could_not_do(tmp_path, capsys):
    (tmp_path / "a.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.74\n")
    assert convert([str(tmp_path / "a.xyz"), "--atoms", "1"]) == 1
    assert "2 atoms, and there are 1 rows" in capsys.readouterr().err
    assert convert([str(tmp_path / "none.xyz")]) == 1
    (tmp_path / "a.npy").mkdir()
    assert convert([str(tmp_path / "a.xyz")]) == 1
    assert "smallfry: " in capsys.readouterr().err


def test_atoms_may_not_touch():
    numbers = np.array([6, 1, 8, 1, 6, 1, 1, 1, 1])
    line = np.arange(9)[:, None] * np.array([1.0, 0, 0])
    with pytest.raises(DataError, match=r"less than 0\.5 bohr apart"):
        Molecule("near", numbers, line * 0.49)
    Molecule("apart", numbers, line * 0.5)
    whole = Molecule("ethanol", numbers, line)
    one, two = (shaken(whole, 0.01, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(one.positions, two.positions)
    assert rows_of(whole, 9)[0, :, 0].tolist() == numbers.tolist()
    assert symbol_of(0) == "0"
    assert symbol_of(-3) == "-3"
    assert names_of([]) == ""
    assert (tuple_of(4), tuple_of([16, 4])) == ((4, 4), (16, 4))


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize(("test", "validation"), [(0.0, 0.0), (0.3, 0.2), (1.0, 0.5)])
def test_molecules_are_divided_without_remainder(count, test, validation):
    given = [None] * count
    parts = molecules_of(given, test, validation, 3)
    assert sorted(n for part in parts.values() for n in part) == [*range(count)]
    assert len(parts["test"]) == round(test * count)
    assert parts == molecules_of(given, test, validation, 3)
    assert all(part == sorted(part) for part in parts.values())


# A cache that was damaged


def test_densities_that_are_none_are_computed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))
    molecule = Molecule("hydrogen", np.array([1, 1]), np.array([[0.0, 0, 0], [0, 0, 1.4]]))
    count, computed = functions_of(molecule.numbers, molecule.positions).nao, []

    class Calculation:
        def run(self):
            return self

    def coefficients(calculation):
        computed.append(calculation)
        return np.arange(count, dtype=np.float64)

    monkeypatch.setattr(data_module, "calculation", lambda given, exact: Calculation())
    monkeypatch.setattr(data_module, "coefficients", coefficients)
    wanted = density_of(molecule)
    file = kept_at(molecule)
    whole = file.read_bytes()
    assert np.array_equal(density_of(molecule), wanted)
    assert len(computed) == 1
    wrong = np.full(count, np.nan), np.zeros(count - 1), np.zeros((count, 1))
    contents = [whole[:-3], b"", b"PK\x03\x04", b"text"]
    for number in range(len(wrong) + len(contents)):
        if number < len(wrong):
            np.save(file, wrong[number])
        else:
            file.write_bytes(contents[number - len(wrong)])
        assert np.array_equal(density_of(molecule), wanted)
        assert len(computed) == 2 + number
        assert file.read_bytes() == whole  # kept again
    moved = Molecule("hydrogen", molecule.numbers, molecule.positions + 1)
    assert len({kept_at(molecule), kept_at(moved), kept_at(molecule, exact=False)}) == 3
    monkeypatch.setenv("SMALLFRY_CACHE", str(file / "below"))
    with pytest.raises(DataError, match=r"densities can't be kept there .* SMALLFRY_CACHE"):
        density_of(molecule)


# Network and task


def test_errors_are_quadratic_and_do_not_depend_on_the_order_of_atoms():
    numbers, positions = WATER
    labels = torch.zeros(1, 4, 4 + WIDTH, dtype=torch.float64)
    labels[0, :3, 0], labels[0, :3, 1:4] = torch.tensor(numbers), torch.tensor(positions)
    labels[..., :4] = labels[..., :4].float()
    labels[0, :3, 4:] = torch.randn(3, WIDTH)
    outputs = torch.cat([labels[..., :1], labels[..., 4:]], dim=2)
    error = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    task, found = DensityCoefficients(), []
    for scale in (0.0, 1.0, -2.0):
        moved = outputs.clone()
        moved[..., 1:] += scale * error
        found.append(task.losses(moved, labels).item())
    assert found[0] == 0
    assert found[2] == pytest.approx(4 * found[1], rel=1e-10)
    order = [3, 1, 0, 2]
    assert task.losses(outputs[:, order], labels[:, order]).item() == 0  # among rows of no atom
    moved = outputs.clone()
    moved[..., 1:] += error
    both = task.losses(moved[:, order], labels[:, order]).item()
    assert both == pytest.approx(found[1], rel=1e-10)
    assert task.right(outputs, labels).tolist() == [True]
    assert task.right(moved, labels).tolist() == [False]


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 3, 52), torch.zeros(2, 4 + WIDTH), torch.zeros(2, 3, 5, 53)]
)
def test_labels_of_other_shapes_are_refused(labels):
    with pytest.raises(UsageError, match="needs molecules to learn"):
        DensityCoefficients().targets(labels, labels)


def test_networks_of_one_element_and_one_layer_and_molecules_of_one_atom():
    torch.manual_seed(0)
    model = DensityNet(elements=(8,), layers=1, channels=(4, 2, 1, 1, 1), radial=4).double()
    alone = torch.tensor([[[[8.0, 1.0, 2.0, 3.0]]]], dtype=torch.float64)
    with torch.no_grad():
        found = model(alone)
        torch.testing.assert_close(model(alone + torch.tensor([0.0, 5, 5, 5])), found)
    assert found.shape == (1, 1, 50)
    # of an atom alone only s functions are there: nothing has a direction
    assert (found[0, 0, 7:] == 0).all()
    assert model(torch.zeros(0, 1, 2, 4, dtype=torch.float64)).shape == (0, 2, 50)


def test_options_of_fixed_sizes_are_taken_or_named():
    with pytest.raises(UsageError, match=r"no data\.image_size"):
        load_data("dft-xyz", "none", image_size=(16, 5))
    with pytest.raises(DataError, match=r"no \.xyz files"):  # (16, 4) is what it has
        load_data("dft-xyz", "none", image_size=(16, 4))
    with pytest.raises(UsageError, match="atoms to 1,000; got 16 and 1001"):
        load_data("dft-g2", options={"atoms": 1001})


# Pictures


def test_planes_keep_distances_of_flat_molecules():
    _, positions = WATER
    turn = Rotation.from_euler("xyz", [0.3, 1.2, 2.0])
    centre, across, spots = plane_of(turn.apply(positions) + 5.0)
    assert centre == pytest.approx(turn.apply(positions).mean(0) + 5)
    assert across @ across.T == pytest.approx(np.eye(2), abs=1e-12)
    apart = [np.linalg.norm(each[:, None] - each, axis=-1) for each in (positions, spots)]
    assert apart[1] == pytest.approx(apart[0], abs=1e-12)
    assert plane_of(np.zeros((1, 3)))[1] @ plane_of(np.zeros((1, 3)))[1].T == pytest.approx(
        np.eye(2)
    )


def test_the_density_of_s_functions_is_round_and_has_its_closed_form():
    numbers, positions = np.array([1]), np.zeros((1, 3))
    functions = functions_of(numbers, positions)
    single = [
        shell
        for shell in range(functions.nbas)
        if functions.bas_angular(shell) == 0 and len(functions.bas_exp(shell)) == 1
    ]
    assert single
    given, wanted = np.zeros(functions.nao), 0.0
    r = np.linspace(0, 2, 41)
    for shell, coefficient in zip(single, (0.7, -0.2, 0.4), strict=False):
        place = functions.ao_loc_nr()[shell]
        given[place] = coefficient
        exponent, charge = functions.bas_exp(shell)[0], charges(functions)[place]
        wanted += coefficient * charge * (exponent / np.pi) ** 1.5 * np.exp(-exponent * r**2)
    shown = density_on_plane(numbers, positions, to_places(numbers, given), 2.0)
    assert shown.shape == (81, 81)
    assert shown == pytest.approx(shown.T, abs=1e-12)
    assert shown == pytest.approx(shown[::-1], abs=1e-12)
    assert shown[40, 40:] == pytest.approx(wanted, abs=1e-12)
