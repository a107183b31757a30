"""Molecules with the densities that PySCF computed for them, each computed once and kept."""

import io
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from pyscf import dft, gto

from smallfry.data import ImageData, Split
from smallfry.data.cache import cache_folder
from smallfry.data.fingerprint import digest
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import DataError, UsageError
from smallfry.io.replace import write_whole
from smallfry.kits.dft.density import AUXILIARY, Floats, coefficients
from smallfry.kits.dft.layout import NAMES, WIDTH, functions_of, to_places
from smallfry.kits.dft.molecules import Molecule, g2_molecules, read_xyz, shaken

__all__ = ["DensitySettings", "calculation", "density_of", "molecules_of", "rows_of"]

log = logging.getLogger(__name__)

VERSION = 1  # changes whenever the densities do
BASIS, FUNCTIONAL = "def2-svp", "pbe"
EXACT, ROUGH = (2, 1e-9), (1, 1e-6)  # level of the grid and tolerance; rough to train with
SHOWN = 20  # densities between two lines about them
TRIES = 5  # shaken geometries, until one converges
LARGEST = 1_000


@dataclass(frozen=True, kw_only=True)
class DensitySettings:
    """Settings of molecules with densities, in ``data.options``.

    Args:
        copies: Shaken geometries of each training molecule beside its own.
        width: Standard deviation of each coordinate's shift, in bohr.
        largest: Most atoms of a molecule that is taken.
        atoms: Rows of an input, which are atoms.
        seed: Of the shifts.

    Raises:
        UsageError: A value out of range.
    """

    copies: int = 3
    width: float = 0.08
    largest: int = 16
    atoms: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.copies <= 100:
            raise UsageError(f"data.options.copies is 0 to 100, got {self.copies}")
        if not 0 < self.width <= 0.5:
            raise UsageError(f"data.options.width is above 0, to 0.5 bohr, got {self.width}")
        if not 2 <= self.largest <= self.atoms <= LARGEST:
            raise UsageError(
                f"data.options.largest is 2 to atoms, and atoms to {LARGEST:,}; got {self.largest} "
                f"and {self.atoms}"
            )


class MoleculeData(ImageData):
    """Molecules: inputs are elements and positions, which stay as they are."""

    @cached_property
    def mean(self) -> tuple[float, ...]:
        """Zero."""
        return (0.0,)

    @cached_property
    def std(self) -> tuple[float, ...]:
        """One."""
        return (1.0,)


def calculation(given: Molecule, exact: bool = True) -> dft.rks.RKS:
    """Set up the calculation whose density is learnt, PBE with def2-SVP; it has not run."""
    made = gto.M(atom=given.atoms(), basis=BASIS, unit="Bohr", verbose=0)
    found = dft.RKS(made, xc=FUNCTIONAL)
    found.grids.level, found.conv_tol = EXACT if exact else ROUGH
    found.max_cycle = 100
    return found


def kept_at(given: Molecule, exact: bool = True) -> Path:
    """Return the file that keeps the density of a molecule."""
    settings = f"dft {VERSION} {AUXILIARY} {BASIS} {FUNCTIONAL} {EXACT if exact else ROUGH}"
    places = (given.numbers.tobytes() + given.positions.tobytes()).hex()
    return cache_folder() / f"dft-{digest(settings, places)}.npy"


def density_of(given: Molecule, exact: bool = True) -> Floats:
    """Compute the coefficients of a molecule's density, or take them from the cache.

    Args:
        given: The molecule.
        exact: With the grid and tolerance of the results; otherwise coarser ones.

    Returns:
        Coefficients in PySCF's order, (functions,).

    Raises:
        UsageError: The calculation does not converge.
        DataError: They can't be kept in the cache.
    """
    file = kept_at(given, exact)
    try:
        kept: Floats = np.load(file, allow_pickle=False)
        fits = kept.shape == (functions_of(given.numbers, given.positions).nao,)
        if fits and np.isfinite(kept).all():
            return kept
    except (OSError, ValueError, EOFError, TypeError, AttributeError, BadZipFile):
        pass
    found = coefficients(calculation(given, exact).run())
    content = io.BytesIO()
    np.save(content, found)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content.getvalue())
    except OSError as error:
        raise DataError(
            f"{file.parent}: densities can't be kept there ({error}); free space, or set another "
            "folder in the environment variable SMALLFRY_CACHE"
        ) from error
    return found


def rows_of(given: Molecule, atoms: int) -> NDArray[np.float32]:
    """Return a molecule as a network's input: element, x, y, z in bohr of atoms (1, atoms, 4).

    Raises:
        DataError: It has more atoms.
    """
    if len(given.numbers) > atoms:
        raise DataError(
            f"{given.name}: {len(given.numbers)} atoms, and there are {atoms} rows for them; "
            "raise data.options.atoms"
        )
    rows = np.zeros((1, atoms, 4), np.float32)
    rows[0, : len(given.numbers), 0] = given.numbers
    rows[0, : len(given.numbers), 1:] = given.positions
    return rows


def molecules_of(
    given: Sequence[Molecule], test: float, validation: float, seed: int
) -> dict[str, list[int]]:
    """Divide molecules at random.

    Args:
        given: The molecules.
        test: Share of them to test with.
        validation: Share of the others to choose with.
        seed: Of the order.

    Returns:
        Positions in ``given`` of train, validation and test.
    """
    order = np.random.default_rng(seed).permutation(len(given)).tolist()
    tested = round(test * len(given))
    held = tested + round(validation * (len(given) - tested))
    parts = {"test": order[:tested], "validation": order[tested:held], "train": order[held:]}
    return {name: sorted(part) for name, part in parts.items()}


def _shaken(given: Molecule, settings: DensitySettings, seeds: tuple[int, ...]) -> Molecule:
    """Shake a molecule until its calculation converges."""
    for attempt in range(TRIES):
        random = np.random.default_rng([settings.seed, *seeds, attempt])
        try:
            moved = shaken(given, settings.width, random)
            density_of(moved, exact=False)
        except (DataError, UsageError):
            log.info("%s: a shaken geometry did not converge, and another is drawn", given.name)
            continue
        return moved
    raise DataError(
        f"{given.name}: {TRIES} shaken geometries did not converge; lower data.options.width"
    )


def _split(
    name: str,
    found: Sequence[Molecule],
    chosen: Sequence[tuple[int, int]],
    settings: DensitySettings,
) -> Split:
    """Build a split of molecules and of their shaken geometries, which are numbered from 1."""
    inputs = np.zeros((len(chosen), 1, settings.atoms, 4), np.float32)
    labels = np.zeros((len(chosen), settings.atoms, 4 + WIDTH), np.float32)
    for place, (number, copy) in enumerate(chosen):
        if place % SHOWN == 0:
            log.info("densities for %s: %d of %d", name, place, len(chosen))
        each = found[number] if copy == 0 else _shaken(found[number], settings, (number, copy))
        density = density_of(each, exact=name == "test")
        inputs[place] = rows_of(each, settings.atoms)
        labels[place, :, :4] = inputs[place, 0]
        labels[place, : len(each.numbers), 4:] = to_places(each.numbers, density)
    return Split(torch.from_numpy(inputs), torch.arange(len(chosen)), torch.from_numpy(labels))


def read(name: str, wanted: Wanted) -> ImageData:
    """Build a data set of molecules, and compute the densities that the cache lacks.

    With a validation share of 0, further shaken geometries of every sixth training molecule are
    the validation split: they choose an epoch and measure nothing.
    """
    settings: DensitySettings = settings_from(DensitySettings, dict(wanted.options))
    size = wanted.images.get("image_size")
    fixed = size if size is not None and tuple_of(size) == (settings.atoms, 4) else None
    wanted.require_fixed(name, channels=1, image_size=fixed)
    found = _source(name, wanted.root)
    found = [each for each in found if len(each.numbers) <= settings.largest]
    parts = molecules_of(found, wanted.test, wanted.validation, wanted.split_seed)
    if not parts["train"] or (wanted.test and not parts["test"]):
        raise DataError(
            f"{name}: {len(found)} molecules of at most {settings.largest} atoms are too few to "
            "train and test with"
        )
    drawn = {
        name: [(number, 0) for number in chosen] for name, chosen in parts.items()
    }  # molecules and which of their geometries
    drawn["train"] = [(n, copy) for n in parts["train"] for copy in range(settings.copies + 1)]
    if not drawn["validation"]:
        drawn["validation"] = [(n, settings.copies + 1) for n in parts["train"][::6]]
    splits = {split: _split(split, found, chosen, settings) for split, chosen in drawn.items()}
    train = splits["train"]
    return MoleculeData(
        name,
        "computed by PySCF",
        ("element", *NAMES),
        (settings.atoms, 4),
        1,
        train.take(torch.arange(len(train))[: wanted.limit]),
        splits["validation"],
        splits["test"],
        generated={
            **{"family": name, "version": VERSION, "functional": FUNCTIONAL, "basis": BASIS},
            **asdict(settings),
        },
    )


def tuple_of(size: int | Sequence[int]) -> tuple[int, ...]:
    """Return height and width of a size, of which one number is both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _source(name: str, root: Path | None) -> list[Molecule]:
    if name == "dft-g2":
        if root is not None:
            raise UsageError("dft-g2 has its molecules from ase and does not use data.root")
        return g2_molecules()
    if root is None:
        raise UsageError("dft-xyz needs the folder of its .xyz files: --data.root FOLDER")
    files = sorted(Path(root).expanduser().glob("*.xyz"))
    if not files:
        raise DataError(f"{root}: has no .xyz files; expected one for each molecule")
    return [read_xyz(file) for file in files]


register_data(("dft-g2",), read)
register_data(("dft-xyz",), read)
