"""Entry point of ``python -m smallfry.cli``."""

import sys

from smallfry.cli import main

if __name__ == "__main__":
    sys.exit(main())
