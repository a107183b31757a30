"""Convert .xyz files to the .npy files that ``smallfry predict`` takes, beside them.

python -m smallfry.kits.dft water.xyz
smallfry predict runs/density water.npy --json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from smallfry.kits.dft.data import DensitySettings, rows_of
from smallfry.kits.dft.molecules import read_xyz

__all__ = ["main"]


def main(given: Sequence[str] | None = None) -> None:
    """Convert the files that the command line names.

    Raises:
        DataError: A file that is no molecule, or has more atoms than rows.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--atoms", type=int, default=DensitySettings.atoms, help="rows")
    options = parser.parse_args(given)
    for file in options.files:
        target = file.with_suffix(".npy")
        np.save(target, rows_of(read_xyz(file), options.atoms))
        print(target)


if __name__ == "__main__":
    main()
