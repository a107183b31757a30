"""Puzzles on square grids of symbols as a data set: cache, splits and symmetries.

A puzzle is a grey image whose pixels are numbers of symbols; its labels are the solution's, one per
cell. No two puzzles of a set are images of each other under a symmetry, so no training puzzle comes
back in another split when it is transformed.
"""

import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.data.cache import decoded
from smallfry.data.fingerprint import digest
from smallfry.data.image_data import ImageData
from smallfry.data.registered import Wanted, register_data
from smallfry.data.sources import EncodedSplit
from smallfry.data.splits import Split
from smallfry.data.symmetry import Symmetry
from smallfry.errors import UsageError
from smallfry.io.registry import add

PARTS = 5  # of all classes, of which one is tested with ``split: class``
MOST_PUZZLES = 1_000_000


class Puzzle(NamedTuple):
    """Generated puzzle."""

    grid: NDArray[np.uint8]  # (side, side), numbers of symbols
    solution: NDArray[np.uint8]  # (side, side)
    difficulty: int  # of the family's own scale, at most 255


class Family(Protocol):
    """Kind of puzzle in one size, a frozen dataclass of its settings."""

    @property
    def side(self) -> int:
        """Side of the grid."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """One character per symbol; the first is padding, the one named "." an open cell."""

    @property
    def usual(self) -> int:
        """Usual number of puzzles."""

    @property
    def recipe(self) -> int:
        """Changes whenever the puzzles of a seed do."""

    def draw(self, seed: int, number: int) -> Puzzle:
        """Generate a puzzle as a pure function of seed and number."""

    def canonical(self, puzzle: Puzzle) -> tuple[str, str]:
        """Return the symmetry class of the solution, and that of the whole puzzle."""

    def symmetries(self, count: int) -> Symmetry:
        """Draw symmetries from PyTorch's global random state."""


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """Settings of every generated set, in ``data.options``.

    Args:
        puzzles: Puzzles of all splits together; 0 for the usual number, 1,000 or, of minimal 4×4
            Sudoku, which has 36 classes in all, 30.
        seed: Seed of the puzzles.
        split: "puzzle" divides the puzzles by chance; "class" tests on those whose solutions no
            symmetry turns into one of training: a fifth of the classes, chosen by a hash.
        symmetries: Train on a random symmetric image of each puzzle.
    """

    puzzles: int = 0
    seed: int = 0
    split: Literal["puzzle", "class"] = "puzzle"
    symmetries: bool = True

    def __post_init__(self) -> None:
        if self.puzzles and not 10 <= self.puzzles <= MOST_PUZZLES:
            raise UsageError(
                f"data.options.puzzles is 10 to {MOST_PUZZLES:,}, or 0 for the usual number, got "
                f"{self.puzzles}"
            )
        if self.split not in ("puzzle", "class"):
            raise UsageError(f"data.options.split is puzzle or class, got '{self.split}'")


Build = Callable[..., tuple[Family, GridSettings]]
_FAMILIES: dict[str, Build] = {}


def register(names: Iterable[str], build: Build) -> None:
    """Register the names of a family, with what builds it from a name and settings.

    Raises:
        UsageError: Another family has one of the names.
    """
    for name in names:
        add(_FAMILIES, name, build, "families of puzzles")
    register_data(_FAMILIES, read_puzzles)


def generated_names() -> tuple[str, ...]:
    """Return the names of all generated sets of puzzles."""
    return tuple(_FAMILIES)


def read_puzzles(name: str, wanted: Wanted) -> ImageData:
    """Generate a data set, or take it from the cache.

    Args:
        name: Its registered name.
        wanted: Options of the family, and shares held out: with ``split: class``, only whether
            ``test`` is 0 matters.

    Raises:
        UsageError: A setting that does not apply.
    """
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root")
    family, settings = _FAMILIES[name](name, wanted.options)
    settings = replace(settings, puzzles=settings.puzzles or family.usual)
    wanted.require_fixed(name, channels=1, image_size=family.side)
    pixels = torch.from_numpy(_cached(name, family, settings))
    grids, solutions = pixels[:, :1].contiguous(), pixels[:, 1].flatten(1).long()
    everything = Split(grids, torch.arange(len(grids)), solutions)
    held = _tested(name, settings, pixels[:, 2, 0, 1], wanted.test, wanted.split_seed)
    chosen = torch.randperm(len(held), generator=_seeded(wanted.split_seed + 1))
    chosen = chosen[~held[chosen]]
    count = round(wanted.validation * len(chosen))
    kept = chosen[count:].sort().values
    return ImageData(
        name,
        "generated",
        family.symbols,
        family.side,
        1,
        everything.take(kept if wanted.limit is None else kept[: wanted.limit]),
        everything.take(chosen[:count].sort().values),
        everything.take(held.nonzero()[:, 0]),
        moments=((0.0,), (1 / 255,)),  # so that inputs are the numbers themselves
        symmetries=family.symmetries if settings.symmetries else None,
        generated={"family": name, **asdict(settings)},
        has_symbols=True,
    )


def _cached(name: str, family: Family, settings: GridSettings) -> NDArray[np.uint8]:
    """Return grids, solutions and facts, (puzzles, 3, side, side), cached as images are.

    The first fact is the difficulty, the second the part of all classes that the puzzle is in.
    """
    made: list[NDArray[np.uint8]] = []
    lock = threading.Lock()

    def read(i: int) -> NDArray[np.uint8]:
        with lock:  # images are read in threads, and each puzzle depends on those before it
            if not made:
                made.extend(_distinct(name, family, settings))
        return made[i]

    settled = {k: v for k, v in asdict(settings).items() if k not in ("split", "symmetries")}
    key = digest(name, repr(settled), str(family.recipe))
    labels = np.zeros(settings.puzzles, np.int64)
    split = EncodedSplit(labels, read, lambda i: f"{name}[{i}]", key)
    return decoded(split, family.side, 3).images


def _distinct(name: str, family: Family, settings: GridSettings) -> list[NDArray[np.uint8]]:
    """Generate puzzles, no two of one symmetry class."""
    seen: set[str] = set()
    found: list[NDArray[np.uint8]] = []
    most = 20 * settings.puzzles
    for number in range(most):
        puzzle = family.draw(settings.seed, number)
        kind, whole = family.canonical(puzzle)
        if whole in seen:
            continue
        seen.add(whole)
        facts = np.zeros_like(puzzle.grid)
        facts.flat[:2] = min(255, puzzle.difficulty), zlib.crc32(kind.encode()) % PARTS
        found.append(np.stack([puzzle.grid, puzzle.solution, facts]))
        if len(found) == settings.puzzles:
            return found
    raise UsageError(
        f"{name}: only {len(found)} of {settings.puzzles} puzzles differ by more than a symmetry; "
        f"take data.options.puzzles {len(found)} or fewer"
    )


def _tested(name: str, settings: GridSettings, parts: Tensor, test: float, seed: int) -> Tensor:
    """Mark the test puzzles, (puzzles,), bool, given the part of all classes that each is in."""
    count = len(parts)
    held = torch.zeros(count, dtype=torch.bool)
    if test == 0:
        return held
    if settings.split == "puzzle":
        held[torch.randperm(count, generator=_seeded(seed))[: max(1, round(test * count))]] = True
        return held
    held = parts == 0
    if not 0 < int(held.sum()) < count:
        raise UsageError(
            f"{name}: has too few symmetry classes to hold some out for testing; take "
            "data.options.split puzzle"
        )
    return held


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
