"""Electron densities as sums of atom-centred functions: fits, and the Fock matrix that one gives.

ρ(r) = Σ_P c_P χ_P(r), with χ the auxiliary functions of PySCF's def2-universal-jfit. Lengths are in
bohr and energies in hartree; coefficients are in PySCF's order and float64. Density fitting after
Whitten, and Dunlap, Connolly and Sabin (1979): the fit has the least Coulomb energy of its error.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyscf import df, dft, gto, scf

from smallfry.errors import UsageError

__all__ = [
    "AUXILIARY",
    "auxiliary",
    "charges",
    "coefficients",
    "constrained",
    "fit",
    "fock",
    "metric",
    "start",
]

AUXILIARY = "def2-universal-jfit"
THIN = 1e-10  # density in electrons a cubic bohr, below which its gradient is taken for zero
PURE = "pbe"  # functional of a guess for one that needs more than the density
GRID = 2  # level of the grid where a calculation has none
BLOCK = 2**24  # integrals held at once
POINTS = 2**14  # of the grid, at once
Floats = NDArray[np.float64]


def auxiliary(molecule: gto.Mole, basis: Any = AUXILIARY) -> gto.Mole:
    """Build the auxiliary functions of a molecule."""
    return df.addons.make_auxmol(molecule, basis)


def metric(functions: gto.Mole) -> Floats:
    """Compute the Coulomb energies (P|Q) of auxiliary functions, (functions, functions)."""
    found: Floats = functions.intor("int2c2e")
    return found


def charges(functions: gto.Mole) -> Floats:
    """Compute ∫χ_P of auxiliary functions in closed form, (functions,): zero but for s.

    Example:
        >>> hydrogen = gto.M(atom="H 0 0 0", basis="def2-svp", spin=1, verbose=0)
        >>> [round(float(each), 3) for each in charges(auxiliary(hydrogen))[:3]]
        [2.803, 6.962, 13.18]
    """
    parts = []
    for shell in range(functions.nbas):
        momentum, exponents = functions.bas_angular(shell), functions.bas_exp(shell)
        # PySCF's weights include the norms of primitives
        weights = functions._libcint_ctr_coeff(shell)
        parts.append(np.zeros((weights.shape[1], 2 * momentum + 1)))
        if momentum == 0:
            parts[-1][:, 0] = (np.pi / exponents) ** 1.5 @ weights / np.sqrt(4 * np.pi)
    return np.concatenate([part.ravel() for part in parts])


def fit(molecule: gto.Mole, matrix: Floats, basis: Any = AUXILIARY) -> Floats:
    """Fit the density of a density matrix without a constraint, (functions,).

    Args:
        molecule: The molecule with its orbitals.
        matrix: Density matrix (orbitals, orbitals), symmetric.
        basis: Of the auxiliary functions.
    """
    functions = auxiliary(molecule, basis)
    doubled = np.asarray(matrix) * (2 - np.eye(len(matrix)))
    packed = doubled[np.tril_indices(len(matrix))]
    projections = [packed @ part for _, part in _integrals(molecule, functions)]
    found = np.linalg.solve(metric(functions), np.concatenate(projections))
    return found.astype(np.float64)


def constrained(found: Floats, functions: gto.Mole, electrons: float) -> Floats:
    """Correct coefficients to a number of electrons, at the least Coulomb energy of the change."""
    q = charges(functions)
    change = np.linalg.solve(metric(functions), q)
    corrected: Floats = found + change * (electrons - q @ found) / (q @ change)
    return corrected


def coefficients(calculation: Any) -> Floats:
    """Fit the density of a converged calculation, with its number of electrons, (functions,).

    Args:
        calculation: A restricted one of PySCF, such as ``RKS(mol, xc="pbe").run()``.

    Raises:
        UsageError: It is open-shell, has not run, or has not converged.
    """
    require_closed_shell(calculation)
    molecule = calculation.mol
    if not calculation.converged:
        raise UsageError(
            "the calculation has not converged, so its density is no label: run kernel(), perhaps "
            "with more than its max_cycle"
        )
    found = fit(molecule, calculation.make_rdm1())
    return constrained(found, auxiliary(molecule), molecule.nelectron)


def fock(calculation: Any, found: Floats, basis: Any = AUXILIARY) -> Floats:
    """Assemble the Fock matrix of a density, F = T + V + J[ρ] + V_xc[ρ], (orbitals, orbitals).

    The functional is that of the calculation if the density and its gradient determine it; of a
    hybrid, of a kinetic-energy functional and of Hartree–Fock it is PBE.

    Args:
        calculation: A restricted one of PySCF; not changed.
        found: Coefficients of the density, (functions,).
        basis: Of the auxiliary functions.

    Raises:
        UsageError: It is open-shell, or has another number of auxiliary functions.
    """
    require_closed_shell(calculation)
    molecule = calculation.mol
    functions = auxiliary(molecule, basis)
    if np.shape(found) != (functions.nao,):
        raise UsageError(
            f"a density of this molecule has {functions.nao} coefficients of its auxiliary "
            f"functions, not {' × '.join(map(str, np.shape(found)))}"
        )
    rows, columns = np.tril_indices(molecule.nao)
    packed = np.zeros(len(rows))
    for part, integrals in _integrals(molecule, functions):
        packed += integrals @ found[part]
    coulomb = np.zeros((molecule.nao, molecule.nao))
    coulomb[rows, columns] = coulomb[columns, rows] = packed
    assembled: Floats = calculation.get_hcore() + coulomb
    return assembled + _exchange_correlation(calculation, functions, found)


def start(calculation: Any, found: Floats) -> Floats:
    """Diagonalise the Fock matrix of a density once, and fill the lowest orbitals.

    Returns:
        Density matrix (orbitals, orbitals), for ``calculation.kernel(dm0=…)``.

    Raises:
        UsageError: As ``fock``.
    """
    energies, orbitals = calculation.eig(fock(calculation, found), calculation.get_ovlp())
    occupations = calculation.get_occ(energies, orbitals)
    return np.array(calculation.make_rdm1(orbitals, occupations))


def require_closed_shell(calculation: Any) -> None:
    """Refuse what needs a spin density.

    Raises:
        UsageError: The calculation is unrestricted, restricted open-shell, or has a spin.
    """
    restricted = isinstance(calculation, scf.hf.RHF) and not isinstance(calculation, scf.rohf.ROHF)
    if not restricted or calculation.mol.spin != 0:
        raise UsageError(
            f"a density guess is for closed shells, and {type(calculation).__name__} of a molecule "
            f"with {calculation.mol.spin} unpaired electrons needs a spin density: start it from "
            "PySCF's own guess"
        )


def _integrals(molecule: gto.Mole, functions: gto.Mole) -> Iterator[tuple[slice, Floats]]:
    """Yield (μν|P) of some functions P at a time, (pairs of orbitals, functions)."""
    places = functions.ao_loc_nr()
    most = max(1, BLOCK // (molecule.nao * (molecule.nao + 1) // 2))
    first = 0
    while first < functions.nbas:
        last = int(np.searchsorted(places, places[first] + most, side="right")) - 1
        last = min(functions.nbas, max(first + 1, last))
        shells = (0, molecule.nbas, 0, molecule.nbas, first, last)
        found = df.incore.aux_e2(
            molecule, functions, "int3c2e", aosym="s2ij", comp=1, shls_slice=shells
        )
        yield slice(int(places[first]), int(places[last])), found
        first = last


def _exchange_correlation(calculation: Any, functions: gto.Mole, found: Floats) -> Floats:
    """Integrate the potential of exchange and correlation between orbitals on a grid."""
    molecule, library = calculation.mol, dft.numint.NumInt()
    functional = _functional(library, calculation)
    grid = dft.gen_grid.Grids(molecule)
    grid.level = getattr(getattr(calculation, "grids", None), "level", GRID)
    grid.build()
    kind = library._xc_type(functional)
    total = np.zeros((molecule.nao, molecule.nao))
    for begin in range(0, len(grid.coords), POINTS):
        points = grid.coords[begin : begin + POINTS]
        weights = grid.weights[begin : begin + POINTS]
        values = dft.numint.eval_ao(functions, points, deriv=1)  # (4, points, functions)
        density = values @ found
        thin = density[0] < THIN  # fitted densities are negative in places
        density[0, thin], density[1:, thin] = THIN, 0
        orbitals = dft.numint.eval_ao(molecule, points, deriv=1)
        if kind == "LDA":
            potential = library.eval_xc_eff(functional, density[0], deriv=1, xctype="LDA")[1]
            potential = potential.reshape(1, -1)
        else:
            potential = library.eval_xc_eff(functional, density, deriv=1, xctype="GGA")[1]
        scaled = potential * weights
        scaled[0] /= 2
        half = np.einsum("xg,xgi->gi", scaled, orbitals[: len(scaled)])
        part = orbitals[0].T @ half
        total += part + part.T
    return total


def _functional(library: Any, calculation: Any) -> str:
    functional = getattr(calculation, "xc", None)
    if functional is None or library.libxc.is_hybrid_xc(functional):
        return PURE
    if library._xc_type(functional) not in ("LDA", "GGA"):
        return PURE
    return str(functional)
