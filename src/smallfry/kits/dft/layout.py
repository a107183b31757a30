"""Places for the coefficients of an atom, of one width for all elements, and their whitening.

An atom has places for shells of s, p, d, f and g functions, 6, 4, 3, 1 and 1 of them, in this order
and within a shell in that of e3nn. Hydrogen uses the first places of each. Functions of one shell
type are nearly dependent, so a place holds z = M^½ c with M their Coulomb energies on the atom.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from pyscf import gto
from pyscf.data.elements import ELEMENTS

from smallfry.errors import UsageError
from smallfry.kits.dft.density import Floats, auxiliary, metric

__all__ = [
    "NAMES",
    "SHELLS",
    "WIDTH",
    "active",
    "functions_of",
    "names_of",
    "symbol_of",
    "to_coefficients",
    "to_places",
    "whitened_metric",
]

SHELLS = (6, 4, 3, 1, 1)  # of s, p, d, f and g functions
WIDTH = sum(count * (2 * momentum + 1) for momentum, count in enumerate(SHELLS))  # 49
FROM_E3NN = {1: (2, 0, 1)}  # p functions of PySCF are x, y, z, those of e3nn y, z, x
NAMES = tuple(
    f"{'spdfg'[momentum]}{shell + 1}{m - momentum:+d}" if momentum else f"s{shell + 1}"
    for momentum, count in enumerate(SHELLS)
    for shell in range(count)
    for m in range(2 * momentum + 1)
)


def functions_of(numbers: NDArray[np.int64], positions: Floats) -> gto.Mole:
    """Build the auxiliary functions of atoms at positions in bohr."""
    atoms = [(ELEMENTS[n], tuple(p)) for n, p in zip(numbers, positions.tolist(), strict=True)]
    spin = int(numbers.sum()) % 2
    return auxiliary(gto.M(atom=atoms, basis="def2-svp", unit="Bohr", spin=spin, verbose=0))


@cache
def _places(number: int) -> tuple[int, ...]:
    """Return the place of each function of an element, in PySCF's order.

    Raises:
        UsageError: It has more shells than there are places.
    """
    functions = _of_one(number)
    used, found = [0] * len(SHELLS), []
    for shell in range(functions.nbas):
        momentum = functions.bas_angular(shell)
        for _ in range(functions.bas_nctr(shell)):
            if momentum >= len(SHELLS) or used[momentum] == SHELLS[momentum]:
                raise UsageError(
                    f"{ELEMENTS[number]} has more auxiliary functions than a network has outputs "
                    f"for an atom: it is for elements up to neon"
                )
            begin = sum(SHELLS[i] * (2 * i + 1) for i in range(momentum))
            begin += used[momentum] * (2 * momentum + 1)
            order = FROM_E3NN.get(momentum, range(2 * momentum + 1))
            found += [begin + each for each in order]
            used[momentum] += 1
    return tuple(found)


@cache
def _roots(number: int) -> tuple[Floats, Floats]:
    """Return M^½ and M^−½ of an element, in PySCF's order (functions, functions)."""
    functions = _of_one(number)
    whole = metric(functions)
    found = np.zeros((2, *whole.shape))
    momenta = np.concatenate(
        [
            np.full(functions.bas_nctr(i) * (2 * functions.bas_angular(i) + 1), momentum)
            for i in range(functions.nbas)
            for momentum in [functions.bas_angular(i)]
        ]
    )
    for momentum in set(momenta.tolist()):
        size = 2 * momentum + 1
        (rows,) = np.nonzero(momenta == momentum)
        block = whole[np.ix_(rows[::size], rows[::size])]  # of one component
        values, vectors = np.linalg.eigh(block)
        for power, matrix in zip((0.5, -0.5), found, strict=True):
            root = vectors * values**power @ vectors.T
            for component in range(size):
                matrix[np.ix_(rows[component::size], rows[component::size])] = root
    return found[0], found[1]


def _of_one(number: int) -> gto.Mole:
    return functions_of(np.array([number]), np.zeros((1, 3)))


def to_places(numbers: NDArray[np.int64], found: Floats) -> Floats:
    """Whiten coefficients in PySCF's order (functions,) to places (atoms, 49)."""
    places, begin = np.zeros((len(numbers), WIDTH)), 0
    for row, number in zip(places, numbers.tolist(), strict=True):
        root = _roots(number)[0]
        row[list(_places(number))] = root @ found[begin : begin + len(root)]
        begin += len(root)
    return places


def to_coefficients(numbers: NDArray[np.int64], places: Floats) -> Floats:
    """Return the coefficients of places (atoms, 49), (functions,), in PySCF's order."""
    parts = [
        _roots(number)[1] @ row[list(_places(number))]
        for number, row in zip(numbers.tolist(), np.asarray(places, np.float64), strict=True)
    ]
    return np.concatenate(parts)


def active(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where in flattened places (atoms · 49,) the functions are, in PySCF's order."""
    parts = [
        WIDTH * atom + np.array(_places(number)) for atom, number in enumerate(numbers.tolist())
    ]
    return np.concatenate(parts)


def whitened_metric(numbers: NDArray[np.int64], positions: Floats) -> Floats:
    """Compute Coulomb energies of the places in use, (functions, functions).

    Of one atom this is the unit matrix.
    """
    whole, begin = metric(functions_of(numbers, positions)), 0
    for number in numbers.tolist():
        root = _roots(number)[1]
        part = slice(begin, begin + len(root))
        whole[part] = root @ whole[part]
        whole[:, part] = whole[:, part] @ root
        begin += len(root)
    return whole


def names_of(numbers: Iterable[int]) -> str:
    """Spell atomic numbers as symbols.

    Example:
        >>> names_of([1, 6])
        'H, C'
    """
    return ", ".join(map(symbol_of, numbers))


def symbol_of(number: int) -> str:
    """Return the symbol of an element, or its number if there is none."""
    return str(ELEMENTS[number]) if 0 < number < len(ELEMENTS) else str(number)
