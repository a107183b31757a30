"""User files beside a folder that smallfry writes, which must stay untouched and unread."""

from pathlib import Path

SUFFIXES = (".old", ".new", ".tmp", ".part", ".previous", ".lock", "~", " (copy)")
NAMES = ("model.onnx", "manifest.json", "notes.txt")
MARK = ".smallfry-"  # begins the names of what smallfry has not finished


def plant(folder: Path) -> dict[str, str]:
    """Create folders and files beside a folder, and return them by name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for suffix in SUFFIXES:
        other = folder.with_name(f"{folder.name}{suffix}")
        other.mkdir()
        for name in NAMES:
            (other / name).write_text(f"{suffix} of mine")
    for name in (f".{folder.name}", f"{folder.name}.yaml", f"{MARK}notes"):
        (folder.parent / name).write_text("of mine")
    return beside(folder)


def beside(folder: Path) -> dict[str, str]:
    """Read all files beside a folder, and below its siblings."""
    found = {}
    for entry in sorted(folder.parent.iterdir()):
        for file in [entry] if entry.is_file() else entry.rglob("*"):
            if entry != folder and file.is_file():
                found[str(file.relative_to(folder.parent))] = file.read_text(errors="replace")
    return found


def harm(folder: Path, before: dict[str, str]) -> str | None:
    """Describe changes to the neighbours, and leftovers of killed work, if any."""
    now = beside(folder)
    for name, content in before.items():
        if now.get(name) != content:
            return f"the neighbour {name} was {'changed' if name in now else 'removed'}"
    left = sorted({*now} - {*before})
    return f"{left[0]} is left" if left else None
