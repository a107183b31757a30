"""Registration by import: modules of a package, and of installed plugins.

A third party's package names a module under ``smallfry.plugins`` in its entry points; importing
that module registers what it brings.
"""

import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

PLUGINS = "smallfry.plugins"


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
