"""Densities of auxiliary functions: goldens, exact cases, and PySCF's own Fock matrices."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyscf", reason="PySCF, of the extra dft, is not installed")
pytest.importorskip("e3nn", reason="e3nn, of the extra dft, is not installed")

import torch
from e3nn import o3
from pyscf import dft, gto, scf

from smallfry.errors import UsageError
from smallfry.kits.dft import coefficients, fock
from smallfry.kits.dft.density import (
    auxiliary,
    charges,
    constrained,
    fit,
    metric,
    start,
)
from smallfry.kits.dft.layout import (
    NAMES,
    SHELLS,
    WIDTH,
    active,
    functions_of,
    names_of,
    to_coefficients,
    to_places,
    whitened_metric,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dft.json").read_text())
WATER = "O 0 0 0.119262; H 0 0.763239 -0.477047; H 0 -0.763239 -0.477047"  # ångström
IRREPS = o3.Irreps("6x0e+4x1o+3x2e+1x3o+1x4e")


def calculated(atoms, functional="pbe", level=2, tolerance=1e-9, basis="def2-svp"):
    """Set up a closed-shell calculation."""
    molecule = gto.M(atom=atoms, basis=basis, verbose=0)
    found = dft.RKS(molecule, xc=functional)
    found.grids.level, found.conv_tol = level, tolerance
    return found


@pytest.fixture(scope="module")
def water():
    """Converge water."""
    return calculated(WATER).run()


def helium(functional, basis):
    """Set up one s function whose square is one auxiliary function, with others around it."""
    molecule = gto.M(atom="He 0 0 0; H 0 0 0.8", basis=basis, charge=1, verbose=0)
    found = dft.RKS(molecule, xc=functional)
    found.grids.level = 2
    return found


ORBITALS = {"He": [[0, [0.25, 1]], [1, [1.5, 1]]], "H": [[0, [1.2, 1]], [2, [1.5, 1]]]}
SQUARE = {"He": [[0, [0.5, 1]], [0, [4.0, 1]], [1, [1.0, 1]]], "H": [[0, [1.0, 1]]]}


@pytest.mark.parametrize(
    "name", ["H2O", *(pytest.param(n, marks=pytest.mark.slow) for n in ("H2CO", "HCN", "CH3OH"))]
)
def test_goldens(name):
    from_ase = pytest.importorskip("ase.collections", reason="ase, of the extra dft, is missing")
    atoms, golden = from_ase.g2[name], GOLDEN[name]
    pairs = list(zip(atoms.get_chemical_symbols(), atoms.positions.tolist(), strict=True))
    found = calculated(pairs).run()
    functions = auxiliary(found.mol)
    fitted, q = fit(found.mol, found.make_rdm1()), charges(functions)
    assert found.e_tot == pytest.approx(golden["e_pbe_def2svp"], abs=1e-6)
    assert (found.mol.nao, functions.nao) == (golden["n_orbitals"], golden["n_aux"])
    assert q @ fitted == pytest.approx(golden["charge_before_constraint"], abs=1e-4)
    energy = fitted @ metric(functions) @ fitted
    assert energy == pytest.approx(golden["fit_self_energy"], rel=1e-4)
    assert fitted[:12] == pytest.approx(golden["c_head"], abs=1e-3)
    assert q[:6] == pytest.approx(golden["q_head"], rel=1e-12)


def test_charges_are_integrals():
    functions = functions_of(np.array([1, 8]), np.array([[0.0, 0, 0], [0, 0, 1.8]]))
    grid = dft.gen_grid.Grids(functions)
    grid.level = 5
    grid.build()
    numeric = grid.weights @ dft.numint.eval_ao(functions, grid.coords)
    assert charges(functions) == pytest.approx(numeric, abs=2e-5)


def test_a_density_of_these_functions_is_fitted_exactly():
    calculation = helium("pbe", ORBITALS)
    matrix = np.zeros((calculation.mol.nao,) * 2)
    matrix[0, 0] = 2
    found = fit(calculation.mol, matrix, SQUARE)
    functions = auxiliary(calculation.mol, SQUARE)
    assert charges(functions) @ found == pytest.approx(2, abs=1e-12)
    assert np.abs(found[1:]).max() < 1e-12
    energy = np.einsum("ijkl,ij,kl", calculation.mol.intor("int2e"), matrix, matrix)
    assert found @ metric(functions) @ found == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize("functional", ["lda,vwn", "pbe", "blyp"])
def test_the_fock_matrix_of_such_a_density_is_pyscfs(functional):
    calculation = helium(functional, ORBITALS)
    matrix = np.zeros((calculation.mol.nao,) * 2)
    matrix[0, 0] = 2
    found = fock(calculation, fit(calculation.mol, matrix, SQUARE), SQUARE)
    assert calculation.grids.coords is None  # not changed
    assert np.abs(found - calculation.get_fock(dm=matrix)).max() < 1e-7


def test_integrals_in_blocks_are_the_same(water, monkeypatch):
    found = coefficients(water)
    whole = fit(water.mol, water.make_rdm1()), fock(water, found)
    monkeypatch.setattr("smallfry.kits.dft.density.BLOCK", 2_000)
    monkeypatch.setattr("smallfry.kits.dft.density.POINTS", 5_000)
    assert fit(water.mol, water.make_rdm1()) == pytest.approx(whole[0], abs=1e-10)
    assert np.abs(fock(water, found) - whole[1]).max() < 1e-10


def test_coulomb_matrices_are_near_pyscfs(water):
    bare = calculated(WATER, "0*lda,")
    coulomb = fock(bare, fit(water.mol, water.make_rdm1())) - bare.get_hcore()
    assert np.abs(coulomb - water.get_j()).max() < 8e-4


def test_the_constraint_has_the_least_energy(water):
    functions = auxiliary(water.mol)
    free, q = fit(water.mol, water.make_rdm1()), charges(functions)
    found = constrained(free, functions, 10)
    assert q @ found == pytest.approx(10, abs=1e-10)
    force = metric(functions) @ (found - free)  # parallel to q
    assert force == pytest.approx(q * (force @ q) / (q @ q), abs=1e-8)


def test_a_fitted_density_saves_cycles_and_any_start_ends_at_the_same_energy(water):
    found = coefficients(water)
    oracle = calculated(WATER)
    oracle.kernel(dm0=start(oracle, found))
    assert water.cycles - oracle.cycles >= 2
    assert oracle.e_tot == pytest.approx(water.e_tot, abs=1e-8)
    noise = np.random.default_rng(0).normal(size=found.shape) * 0.05
    other = calculated(WATER)
    other.kernel(dm0=start(other, found + noise))
    assert other.converged
    assert other.e_tot == pytest.approx(water.e_tot, abs=1e-8)


def test_hybrids_and_hartree_fock_start_with_pbe(water):
    found = coefficients(water)
    wanted = fock(water, found)
    for other in (calculated(WATER, "b3lyp"), calculated(WATER, "tpss"), scf.RHF(water.mol)):
        assert np.abs(fock(other, found) - wanted).max() < 1e-10
    assert np.abs(fock(calculated(WATER, "blyp"), found) - wanted).max() > 1e-3


@pytest.mark.slow
def test_labels_turn_with_the_molecule():
    skew = torch.tensor([[0, 1.1, -0.4], [-1.1, 0, 0.7], [0.4, -0.7, 0.0]], dtype=torch.float64)
    turn = torch.matrix_exp(skew).numpy()
    parts = []
    for matrix in (np.eye(3), turn):
        molecule = gto.M(atom=WATER, basis="def2-svp", verbose=0)
        molecule.set_geom_(molecule.atom_coords() @ matrix.T, unit="Bohr")
        calculation = dft.RKS(molecule, xc="pbe")
        calculation.grids.level, calculation.conv_tol = 4, 1e-11
        parts.append(to_places(np.array([8, 1, 1]), coefficients(calculation.run())))
    # e3nn's axes are (y, z, x)
    swap = torch.eye(3, dtype=torch.float64)[[1, 2, 0]]
    wigner = IRREPS.D_from_matrix(swap @ torch.from_numpy(turn) @ swap.T).numpy()
    assert np.abs(parts[0] @ wigner.T - parts[1]).max() < 2e-6
    assert np.abs(parts[0] - parts[1]).max() > 1e-2


def test_what_needs_a_spin_density_is_refused(water):
    open_shell = gto.M(atom="O 0 0 0; H 0 0 1", basis="def2-svp", spin=1, verbose=0)
    for calculation in (dft.UKS(open_shell), dft.ROKS(open_shell), dft.UKS(water.mol)):
        with pytest.raises(UsageError, match="unpaired electrons needs a spin density"):
            fock(calculation, np.zeros(3))
    with pytest.raises(UsageError, match="has not converged"):
        coefficients(calculated(WATER))
    with pytest.raises(UsageError, match="has 71 coefficients of its auxiliary functions, not 3"):
        fock(water, np.zeros(3))


# Places of coefficients


def test_places_and_their_names():
    assert WIDTH == len(NAMES) == IRREPS.dim == 49
    assert NAMES[:8] == ("s1", "s2", "s3", "s4", "s5", "s6", "p1-1", "p1+0")
    assert [(each.mul, each.ir.l) for each in IRREPS] == [(n, k) for k, n in enumerate(SHELLS)]
    assert names_of([1, 16, 200]) == "H, S, 200"


def test_whitening_keeps_energies_and_is_inverted():
    numbers, random = np.array([8, 1, 1, 6]), np.random.default_rng(0)
    positions = random.normal(size=(4, 3)) * 2
    functions = functions_of(numbers, positions)
    given = random.normal(size=functions.nao)
    places = to_places(numbers, given)
    assert (places[1, 3:6] == 0).all()  # hydrogen has three s functions
    assert to_coefficients(numbers, places) == pytest.approx(given, abs=1e-11)
    used = places.ravel()[active(numbers)]
    energy = used @ whitened_metric(numbers, positions) @ used
    assert energy == pytest.approx(given @ metric(functions) @ given, rel=1e-11)
    alone = whitened_metric(numbers[:1], positions[:1])
    assert np.abs(alone - np.eye(49)).max() < 1e-10


def test_heavy_elements_have_no_places():
    with pytest.raises(UsageError, match="S has more auxiliary functions"):
        active(np.array([16]))
