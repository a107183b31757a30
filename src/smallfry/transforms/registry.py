"""Registry of transforms by their names in files."""

from typing import Any, TypeVar

from smallfry.errors import RunError, nearest
from smallfry.io.plugins import load_plugins, scan
from smallfry.io.registry import add

T = TypeVar("T", bound=type)

_kinds: dict[str, Any] = {}


def register(kind: T) -> T:
    """Register a class of transforms by its ``kind``; a decorator.

    Raises:
        UsageError: Another class has the name already.
    """
    add(_kinds, kind.kind, kind, "transforms")  # type: ignore[attr-defined]
    return kind


def kinds() -> dict[str, Any]:
    """Return all registered transforms by kind.

    Example:
        >>> from smallfry.transforms import kinds
        >>> "resize" in kinds()
        True
    """
    scan("smallfry.transforms")
    load_plugins()
    return dict(_kinds)


def find(name: str, where: str) -> Any:
    """Find the transform of a kind.

    Raises:
        RunError: There is none; it may belong to a package that is not installed.
    """
    known = _kinds if name in _kinds else kinds()
    if name not in known:
        raise RunError(
            f"{where}: has the unknown transform '{name}'; install the version or package that "
            f"provides it{nearest(name, known)}"
        )
    return known[name]
