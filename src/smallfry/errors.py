"""Errors that a user can fix: what was wrong, what was expected, what to do, in one line."""

from smallfry_runtime.errors import (
    AccessError,
    DataError,
    ExportError,
    ServerError,
    SmallfryError,
    SmallfryWarning,
    UsageError,
    is_out_of_memory,
    nearest,
    refusal,
)

__all__ = [
    "AccessError",
    "DataError",
    "ExportError",
    "HubError",
    "RunError",
    "ServerError",
    "SmallfryError",
    "SmallfryWarning",
    "Stopped",
    "TrainingError",
    "UsageError",
    "first_line",
    "is_out_of_memory",
    "nearest",
    "refusal",
    "shortened",
]

LONGEST = 1000  # characters of a message


class RunError(SmallfryError):
    """Unusable run folder: incomplete, damaged, foreign or in use."""


class TrainingError(SmallfryError):
    """Failed training, such as after a NaN loss."""


class HubError(SmallfryError):
    """Failure to reach a model hub, or its refusal."""


class Stopped(Exception):
    """Stop requested by a signal, with all work saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)  # as pickle makes it again
        self.signal_number, self.message = signal_number, message

    def __str__(self) -> str:
        return self.message


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none.

    Example:
        >>> first_line(ValueError("no such size\\nin all")), first_line(MemoryError())
        ('no such size', 'MemoryError')
    """
    return (str(error) or type(error).__name__).splitlines()[0]


def shortened(text: str) -> str:
    """Cut the middle out of a text too long for a message."""
    if len(text) <= LONGEST:
        return text
    begin, end = LONGEST * 2 // 3, LONGEST // 4
    return f"{text[:begin]} […] {text[-end:]}"
