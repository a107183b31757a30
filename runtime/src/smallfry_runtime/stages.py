"""Names of files and folders being replaced, and leftovers of killed processes.

``smallfry.io.replace`` writes them; a reader looks here, and changes nothing.
"""

import hashlib
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

MARK = ".smallfry-"  # begins the name of whatever is being written
OLD, MOVED = "old", "moved"  # what is being replaced, in a folder beside it or inside it
OF_VOLUMES = "lost+found"  # an entry of a new disk


def interrupted(folder: Path) -> bool:
    """Return whether a process was killed, or is at work, in the middle of replacing the folder."""
    folder = resolved(folder)
    return any(
        (stage / name).exists()
        for stage in stages_of(folder)
        for name in (OLD, MOVED)
        if stage.parent == folder or not folder.exists()
    )


def obstacle(
    folder: Path,
    kind: str = "",
    names: Collection[str] = (),
    is_one: Callable[[Path], bool] = lambda folder: False,
) -> str | None:
    """Describe what replacing a folder would lose; None if nothing.

    Args:
        folder: The place.
        kind: Kind of folder that may be replaced, in a word.
        names: Names of its possible files.
        is_one: Predicate for folders of that kind.
    """
    if not folder.is_dir():
        return "exists and is not a folder" if os.path.lexists(folder) else None
    found = entries(folder)
    if found and not is_one(folder):
        return f"exists and is not {_with_article(kind or 'empty folder')}"
    for name in found:
        if name not in names:
            such = _with_article(kind)
            return f"holds {name} too, which is no part of such {such} and would be lost"
    return None


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def entries(folder: Path) -> list[str]:
    """List a folder, without staged files and those of an empty disk; empty if it is absent.

    Raises:
        OSError: It is no folder, or can't be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(n for n in names if not n.startswith(MARK) and n != OF_VOLUMES)


def resolved(path: Path) -> Path:
    """Resolve a path, following a link."""
    return Path(os.path.realpath(path))


def prefix_of(path: Path) -> str:
    """Return the prefix of the staging names of a path, unique to that path."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return f"{MARK}{path.name[:40]}-{digest}-"


def stages_of(folder: Path) -> list[Path]:
    """Find the stages of a folder, beside it or in it."""
    prefix, found = prefix_of(folder), []
    for place in (folder.parent, folder):
        with suppress(OSError):
            names = [name for name in os.listdir(place) if name.startswith(prefix)]
            found += [place / name for name in names if (place / name).is_dir()]
    return found
