"""Order in which a model's structure is changed."""

from enum import IntEnum


class Stage(IntEnum):
    """Place of a transform: none comes after one of a later stage."""

    ARCHITECTURE = 1
    WIDTH = 2
    FACTOR = 3
    SPARSE = 4
    ADAPTER = 5
    BITS = 6
