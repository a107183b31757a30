"""Registration by import: modules of a package, kits, and installed plugins.

A kit is a folder of ``smallfry.kits``. It is imported when one of its names is asked for, which
begins with the kit's: the task ``ocr`` and the data set ``ocr-words`` are of the kit ``ocr``.

A third party's package names a module under ``smallfry.plugins`` in its entry points; importing
that module registers what it brings.
"""

import pkgutil
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

PLUGINS = "smallfry.plugins"
KITS = "smallfry.kits"
FOLDER = Path(__file__).parent.parent / "kits"


@cache
def scan(package: str) -> None:
    """Import all modules of a package, so that they register their contents."""
    for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
        import_module(module.name)


@cache
def load_plugins() -> None:
    """Import the modules that installed packages declare as plugins."""
    for point in entry_points(group=PLUGINS):
        point.load()


@cache
def kit_names() -> tuple[str, ...]:
    """List the kits, without importing them."""
    return tuple(sorted(each.parent.name for each in FOLDER.glob("*/__init__.py")))


def load_kit(name: str) -> None:
    """Import the kit of a task or data set, if there is one.

    Args:
        name: Of the task or data set.

    Raises:
        ModuleNotFoundError: The kit needs a package that is not installed.
    """
    kit = name.partition("-")[0]
    if kit in kit_names():
        scan(f"{KITS}.{kit}")


@cache
def load_kits() -> None:
    """Import all kits whose packages are installed, to find a model that one of them has."""
    for kit in kit_names():
        with suppress(ModuleNotFoundError):
            load_kit(kit)
