"""Checks of values from files and requests."""

import sys
from typing import Any, TypeGuard

__all__ = ["is_number"]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is a finite number that a float can hold; True and False are none.

    Example:
        >>> [is_number(value) for value in (3, 0.5, float("nan"), 10**400, True, "3")]
        [True, True, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
