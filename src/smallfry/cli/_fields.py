"""Field types of a verb's ``Options``: positional arguments and settings.

A field becomes an option of its name, and its description in the docstring becomes the help:

==================================  ====================================================
field                               on the command line
==================================  ====================================================
``run: str`` (no default)           positional and required
``inputs: tuple[str, ...]``         positional, one or more
``top_k: int = 3``                  ``--top_k K``
``json: bool = False``              ``--json``, a flag
``sizes: tuple[int, ...] = (1,)``   ``--sizes 1 2``
``data: OtherData`` (a dataclass)   ``--data.name``, ``--data.root``, and ``--data NAME``
==================================  ====================================================

The functions below mark the fields that are anything else.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, NamedTuple

ROLE = "role"
METAVAR = "metavar"


class Choice(NamedTuple):
    """Subcommand of a verb.

    Attributes:
        purpose: Its line in the help.
        settings: Class of its settings, the field that ``settings_of`` marks.
        defaults: Settings whose default is not that of the class, by dotted name.
        presets: Further defaults by the name of the flag that enables them, a field of
            ``Options``; it counts on the command line only, not in a file.
    """

    purpose: str
    settings: type
    defaults: Mapping[str, Any] = {}
    presets: Mapping[str, Mapping[str, Any]] = {}


def option(default: Any = None, *, metavar: str) -> Any:
    """Declare an option with another placeholder in the help than its name."""
    return field(default=default, metadata={METAVAR: metavar})


def argument(default: Any = None) -> Any:
    """Declare an optional positional argument."""
    return field(default=default, metadata={ROLE: "argument"})


def group_of(kind: type) -> Any:
    """Declare a dataclass whose fields are options without a prefix."""
    return field(default_factory=kind, metadata={ROLE: "group"})


def settings_of(kind: type) -> Any:
    """Declare a configuration class, filled by options or ``--config FILE``."""
    return field(default_factory=kind, metadata={ROLE: "settings"})


def command_only(*, metavar: str) -> Any:
    """Declare an option that only the command line may set, never a file; it can be repeated.

    The field is of type ``tuple[str, ...]``, and empty without the option.
    """
    return field(default=(), metadata={ROLE: "command_only", METAVAR: metavar})


def given_settings(beside: str) -> Any:
    """Declare the settings given on the command line or in its file, without defaults.

    Filled in for a field of type ``Mapping[str, Any]``; groups of settings are mappings in it.

    Args:
        beside: An option; without it, the mapping stays empty.
    """
    return field(default_factory=dict, metadata={ROLE: "given", "beside": beside})


def process_count() -> Any:
    """Declare a process count; a verb with this field can run in several processes."""
    return field(default=None, metadata={ROLE: "processes", METAVAR: "N"})


def choice_of(choices: Mapping[str, Choice]) -> Any:
    """Declare the name of a subcommand, which selects the class of the settings."""
    return field(metadata={ROLE: "choice", "choices": choices})
