"""Molecules: Cartesian files, those of the G2 set, and shaken ones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyscf.data.elements import ELEMENTS
from pyscf.data.nist import BOHR

from smallfry.errors import DataError, UsageError
from smallfry_runtime.files import MOST_TEXT, read_bytes

__all__ = ["ELEMENTS_LEARNT", "Molecule", "g2_molecules", "read_xyz", "shaken"]

ELEMENTS_LEARNT = (1, 6, 7, 8)
NEAREST = 0.5  # bohr between two atoms, at least
FARTHEST = 1e6  # ångström from the origin, below which an atom is


@dataclass(frozen=True)
class Molecule:
    """Neutral molecule of closed shells.

    Args:
        name: Its name.
        numbers: Atomic numbers (atoms,), int64.
        positions: Of the atoms (atoms, 3), in bohr, float64 with the values of float32.

    Raises:
        DataError: It has an odd number of electrons, or two atoms in one place.
    """

    name: str
    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.numbers.sum() % 2:
            raise DataError(
                f"{self.name}: {self.numbers.sum()} electrons are no closed shell; expected a "
                "neutral molecule of paired electrons"
            )
        apart = np.linalg.norm(self.positions[:, None] - self.positions, axis=-1)
        if (apart + 9 * np.eye(len(apart)) < NEAREST).any():
            raise DataError(f"{self.name}: two atoms are less than {NEAREST} bohr apart")

    def atoms(self) -> list[tuple[str, tuple[float, ...]]]:
        """List symbols and positions in bohr, as PySCF takes them with ``unit="Bohr"``."""
        pairs = zip(self.numbers, self.positions.tolist(), strict=True)
        return [(ELEMENTS[number], tuple(place)) for number, place in pairs]


def molecule(name: str, numbers: NDArray[np.int64], angstrom: NDArray[np.float64]) -> Molecule:
    """Build a molecule of positions in ångström, rounded to float32."""
    rounded = (angstrom / BOHR).astype(np.float32).astype(np.float64)
    return Molecule(name, np.asarray(numbers, np.int64), rounded)


def read_xyz(file: Path) -> Molecule:
    """Read a Cartesian file: the number of atoms, a line of text, then symbol and ångströms.

    Raises:
        DataError: It can't be read, or has another form.
    """
    form = "expected the number of atoms, a line of text, and a line 'symbol x y z' for each atom"
    try:
        lines = read_bytes(file, MOST_TEXT).decode().splitlines()
        count = int(lines[0])
        rows = [line.split() for line in lines[2 : 2 + count]]
        numbers = [_number(row[0]) for row in rows]
        places = np.array([[float(each) for each in row[1:4]] for row in rows])
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{file}: can't be read as a molecule ({error}); {form}") from error
    if count < 1 or places.shape != (count, 3) or not (np.abs(places) < FARTHEST).all():
        raise DataError(f"{file}: has {len(rows)} atoms of {count}; {form}")
    return molecule(file.stem, np.array(numbers), places)


def _number(symbol: str) -> int:
    """Return the atomic number of a symbol, or of a number."""
    if symbol.isdigit():
        return int(ELEMENTS.index(ELEMENTS[int(symbol)], 1))  # neither 0 nor beyond the last
    return int(ELEMENTS.index(symbol.capitalize(), 1))


def g2_molecules() -> list[Molecule]:
    """List the 61 closed-shell molecules of hydrogen, carbon, nitrogen and oxygen in the G2 set.

    Geometries are those that ase has (Curtiss et al. 1997). Radicals have magnetic moments
    there, by which they are left out; the singlet of CH2 has none.

    Raises:
        UsageError: ase is not installed.
    """
    try:
        from ase.collections import g2
    except ModuleNotFoundError as error:
        raise UsageError(
            "dft-g2 takes its geometries from ase: pip install 'smallfry[dft]', or train on "
            "files of your own with --data dft-xyz --data.root FOLDER"
        ) from error
    found = []
    for name in g2.names:
        atoms = g2[name]
        known = set(atoms.numbers.tolist()) <= set(ELEMENTS_LEARNT)
        if known and len(atoms) > 1 and not atoms.get_initial_magnetic_moments().any():
            found.append(molecule(name, atoms.numbers, atoms.positions))
    return found


def shaken(given: Molecule, width: float, random: np.random.Generator) -> Molecule:
    """Move each coordinate by a normal deviate of a width in bohr."""
    moved = given.positions + width * random.standard_normal(given.positions.shape)
    rounded = moved.astype(np.float32).astype(np.float64)
    return Molecule(f"{given.name} shaken", given.numbers, rounded)
