"""Natural order of names: numbers in them by size, not by their digits."""

import re

__all__ = ["natural"]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a key that sorts names by the numbers in them, filled up with zeros or not.

    Example:
        >>> sorted(["10.png", "9.png", "x1", "010.png"], key=natural)
        ['9.png', '010.png', '10.png', 'x1']
    """
    parts = [part.group() for part in re.finditer(r"[0-9]+|[^0-9]+", name)]
    return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in parts], name
