"""Generated data sets: seeded, with exact solutions, and named in the data they give.

Each module registers its names; importing this package imports all of them.
"""

from smallfry.data.generators.grids import generated_names
from smallfry.io.plugins import scan

scan(__name__)

__all__ = ["generated_names"]
