"""Verbs of the command: every public module of this package."""

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """Command-line verb.

    Attributes:
        name: Such as ``train``.
        summary: Its line in the help, the first of the module's docstring.
        module: It has ``Options``, a frozen dataclass, and ``run(options) -> int``.
    """

    name: str
    summary: str
    module: Any


def verb_names() -> list[str]:
    """Return the names of all verbs in alphabetical order, without importing them."""
    found = pkgutil.iter_modules(import_module(__package__).__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


@cache
def load_verb(name: str) -> Verb:
    """Import the module of a verb."""
    module = import_module(f"{__package__}.{name}")
    line = (module.__doc__ or name).splitlines()[0].removesuffix(".")
    return Verb(name, line[0].lower() + line[1:], module)
