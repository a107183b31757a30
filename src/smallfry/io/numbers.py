"""Numbers as text."""


def exact(value: float) -> str:
    """Format a number so that others have other texts, and shortly where that is possible.

    Example:
        >>> exact(0.5), exact(100000.0), exact(0.1234567), exact(0.1234568)
        ('0.5', '100000', '0.1234567', '0.1234568')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
