"""Entry point of ``smallfry`` and ``python -m smallfry``."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from smallfry.cli import main


def run() -> NoReturn:
    """Run the command, and end the process with its exit code.

    Where Gradio is loaded, Python would spend seconds looking through all objects for garbage.
    """
    code = main()
    if "gradio" in sys.modules:
        with suppress(OSError):  # whoever read the output has seen enough
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
