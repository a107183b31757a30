"""Errors that a user can mend: what was wrong, what was expected, what to do, in one line."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class SmallfryError(Exception):
    """A problem that the user can mend; the command prints it without a traceback."""


class UsageError(SmallfryError):
    """A request that can't be meant: an unknown name, options that contradict each other."""


class DataError(SmallfryError):
    """Images or labels that are missing, unreadable or don't fit."""


class AccessError(DataError):
    """A file that can't be read now, which says nothing of what is in it."""


class ExportError(SmallfryError):
    """An export that can't be made, or can't be used: damaged, foreign, of another version."""


class SmallfryWarning(UserWarning):
    """Something was handled in a way that the user should know of."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, PyTorch or the system says that memory is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = (
        *("can't allocate memory", "not enough memory", "can't start new thread", "bad_alloc"),
        "could not create a primitive",  # oneDNN
    )
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)


def refusal(error: OSError) -> str | None:
    """What the system has against a file, in words; None if that is no fault of its name or place.

    Other errors of the system are not expected where they come from.
    """
    reasons = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM)
    if error.errno not in (*reasons, errno.EROFS) or error.filename is None:
        return None
    return f"'{error.filename}': {error.strerror}"


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for an unknown name: ``; did you mean 'digits'?``, or the names there are."""
    known = sorted(names)
    close = [k for k in known if k.startswith(name)] or get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are {', '.join(known)}" if len(known) <= 20 else ""
