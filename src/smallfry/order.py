"""Order of structural changes to a model."""

from enum import IntEnum


class Stage(IntEnum):
    """Stage of a transform; stages never decrease along a spec.

    Example:
        >>> from smallfry.order import Stage
        >>> Stage.WIDTH < Stage.BITS
        True
    """

    ARCHITECTURE = 1
    WIDTH = 2
    FACTOR = 3
    SPARSE = 4
    ADAPTER = 5
    BITS = 6
    NEST = 7
