"""Errors that a user can mend: what was wrong, what was expected, what to do, in one line."""

from smallfry_runtime.errors import (
    AccessError,
    DataError,
    ExportError,
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
    "DemoError",
    "ExportError",
    "HubError",
    "RunError",
    "SmallfryError",
    "SmallfryWarning",
    "Stopped",
    "TrainingError",
    "UsageError",
    "is_out_of_memory",
    "nearest",
    "refusal",
]


class RunError(SmallfryError):
    """A run folder that can't be used: incomplete, damaged, foreign or taken."""


class TrainingError(SmallfryError):
    """Training that can't go on, such as a loss that is not a number."""


class DemoError(SmallfryError):
    """The demo's page can't be served: a package is missing, or a port is taken."""


class HubError(SmallfryError):
    """A model hub that can't be reached, or that refuses."""


class Stopped(Exception):
    """A signal asked for an end; what was done is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)  # as pickle makes it again
        self.signal_number, self.message = signal_number, message

    def __str__(self) -> str:
        return self.message
