"""Command ``smallfry``: one module per verb.

A verb's module has ``Options``, a frozen dataclass whose fields are the options and whose docstring
is the help, and ``run(options)``, which returns the exit code and imports what is heavy. The first
line of the module is its line in ``smallfry --help``. Modules with a leading underscore are what
makes a command of them; ``_fields`` has the rules.
"""

import sys
from collections.abc import Sequence

from smallfry.cli._extras import explain_missing
from smallfry.cli._messages import FAILED, complain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 for a failure, 2 for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        from smallfry.cli._main import run  # with packages that an installation may lack
    except ModuleNotFoundError as error:
        missing = explain_missing(error)
        if missing is None or "--debug" in arguments:
            raise
        return complain(missing, FAILED)
    return run(arguments)
