"""Storage of an export's graphs: as they are, packed, or as parts of the full model's graphs."""

from collections.abc import Callable, Mapping
from pathlib import Path

from smallfry_runtime.errors import DataError, ExportError
from smallfry_runtime.packed import unpack
from smallfry_runtime.shared import restore

__all__ = ["PACKED", "PLAIN", "SHARED", "SUFFIXES", "base_of", "restored", "stored_names"]

PLAIN, PACKED, SHARED = "plain", "packed", "shared"
SUFFIXES = {PLAIN: "", PACKED: ".packed", SHARED: ".shared"}  # after a graph's own

Bases = Callable[[], Mapping[str, bytes]]


def stored_names(names: tuple[str, ...], storage: str) -> tuple[str, ...]:
    """Return the names of the files that hold graphs."""
    return tuple(name + SUFFIXES[storage] for name in names)


def base_of(folder: Path) -> Path:
    """Return the export whose weights a sub-model in its folder shares."""
    return folder.absolute().parent.parent


def restored(
    contents: Mapping[str, bytes], storage: str, folder: Path, bases: Bases
) -> dict[str, bytes]:
    """Restore the graphs of an export.

    Args:
        contents: Files by name.
        storage: How they are stored.
        folder: The export, for messages.
        bases: Reads the full model's graphs, by their own names.

    Returns:
        Graphs by their own names.

    Raises:
        ExportError: They can't be restored.
    """
    end = SUFFIXES[storage]
    given = {name.removesuffix(end) if end else name: c for name, c in contents.items()}
    if storage == PLAIN:
        return given
    base = bases() if storage == SHARED else {}
    try:
        if storage == PACKED:
            return {name: unpack(content) for name, content in given.items()}
        return {name: restore(content, base[name]) for name, content in given.items()}
    except (DataError, KeyError) as error:
        raise ExportError(f"{folder}: {error}; export the run again") from error
