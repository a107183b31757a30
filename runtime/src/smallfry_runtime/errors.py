"""Errors that a user can fix: what was wrong, what was expected, what to do, in one line."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class SmallfryError(Exception):
    """A problem that the user can fix; the command prints it without a traceback."""


class UsageError(SmallfryError):
    """An invalid request: an unknown name, or contradictory options."""


class DataError(SmallfryError):
    """Missing, unreadable or incompatible images or labels."""


class AccessError(DataError):
    """A file that can't be read at the moment; its content is not at fault."""


class ExportError(SmallfryError):
    """An export that can't be made or used: damaged, foreign, or of another version."""


class ServerError(SmallfryError):
    """A failure to serve: a port in use, an address of another machine, a missing package."""


class SmallfryWarning(UserWarning):
    """A warning about something handled in a way that the user should know of."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, PyTorch or the system means out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = (
        "can't allocate",  # memory, in PyTorch; a lock or a read lock, in Python
        *("not enough memory", "can't start new thread", "bad_alloc"),
        "could not create a primitive",  # oneDNN
    )
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)


def refusal(error: OSError) -> str | None:
    """Describe why the system refused a file; None if its name and path are not at fault.

    Other errors of the system are not expected where they come from.
    """
    reasons = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM)
    if error.errno not in (*reasons, errno.EROFS) or error.filename is None:
        return None
    return f"'{error.filename}': {error.strerror}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggest names for an unknown one: ``; did you mean 'digits'?``, or the list of them."""
    known = sorted(names)
    close = [k for k in known if k.startswith(name)] or get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are {', '.join(known)}" if len(known) <= 20 else ""
