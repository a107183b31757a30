"""Convert .xyz files to the .npy files that ``smallfry predict`` takes, beside them.

python -m smallfry.kits.dft water.xyz
smallfry predict runs/density water.npy --json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from smallfry.errors import SmallfryError
from smallfry.io.terminal import say
from smallfry.kits.dft.data import DensitySettings, rows_of
from smallfry.kits.dft.molecules import read_xyz

__all__ = ["main"]


def main(given: Sequence[str] | None = None) -> int:
    """Convert the files that the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--atoms", type=int, default=DensitySettings.atoms, help="rows")
    options = parser.parse_args(given)
    for file in options.files:
        target = file.with_suffix(".npy")
        try:
            np.save(target, rows_of(read_xyz(file), options.atoms))
        except (SmallfryError, OSError) as error:  # no molecule, too many atoms, or no place
            say(f"smallfry: {error}", sys.stderr)
            return 1
        say(str(target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
