"""Electrodes of the 10-20 system: the paper's 30, in its order, on a head of radius 1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["ELECTRODES", "FRONTAL", "TEMPORAL", "doubled", "numbers_of", "positions_of"]

# x to the right, y to the nose
_PLACES = {
    "Fp1": (-0.31, 0.95), "Fp2": (0.31, 0.95),
    "F7": (-0.81, 0.59), "F3": (-0.42, 0.52), "Fz": (0.0, 0.5), "F4": (0.42, 0.52),
    "F8": (0.81, 0.59),
    "FT7": (-0.95, 0.31), "FC3": (-0.47, 0.27), "FCz": (0.0, 0.25), "FC4": (0.47, 0.27),
    "FT8": (0.95, 0.31),
    "T3": (-1.0, 0.0), "C3": (-0.5, 0.0), "Cz": (0.0, 0.0), "C4": (0.5, 0.0), "T4": (1.0, 0.0),
    "TP7": (-0.95, -0.31), "CP3": (-0.47, -0.27), "CPz": (0.0, -0.25), "CP4": (0.47, -0.27),
    "TP8": (0.95, -0.31),
    "T5": (-0.81, -0.59), "P3": (-0.42, -0.52), "Pz": (0.0, -0.5), "P4": (0.42, -0.52),
    "T6": (0.81, -0.59),
    "O1": (-0.31, -0.95), "Oz": (0.0, -1.0), "O2": (0.31, -0.95),
}  # fmt: skip
_NEW_NAMES = {"t7": "t3", "t8": "t4", "p7": "t5", "p8": "t6"}  # of the 10-10 system

ELECTRODES = tuple(_PLACES)
FRONTAL = ("Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8")
TEMPORAL = ("FT7", "FT8", "T3", "T4", "TP7", "TP8", "T5", "T6")


def positions_of(names: Sequence[str]) -> NDArray[np.float64] | None:
    """Return positions (electrodes, 2); None if one of the names is unknown."""
    found = [_PLACES.get(name) for name in names]
    return None if None in found else np.array(found, np.float64)


def numbers_of(wanted: Sequence[str], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Find electrodes among others, whatever the case, and by the newer names too.

    Args:
        wanted: Their names.
        names: The names of a recording.

    Returns:
        Their places in ``names``, and the names of those that are missing.
    """
    places = {_spelled(name): i for i, name in enumerate(names)}
    missing = [name for name in wanted if _spelled(name) not in places]
    return [places[_spelled(name)] for name in wanted if name not in missing], missing


def doubled(names: Sequence[str]) -> str | None:
    """Return an electrode of a recording that has two names or one twice; None without any."""
    spelled = [_spelled(name) for name in names]
    found = (name for i, name in enumerate(names) if spelled[i] in spelled[:i])
    return next(found, None)


def _spelled(name: str) -> str:
    folded = name.strip().strip(".").lower()
    return _NEW_NAMES.get(folded, folded)
