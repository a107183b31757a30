"""Errors that a user can fix: what was wrong, what was expected, what to do, in one line."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

MOST_NAMED = 40  # names in a message


class SmallfryError(Exception):
    """Problem for the user to fix, printed by the command without a traceback."""


class UsageError(SmallfryError):
    """Invalid request: an unknown name, or contradictory options."""


class DataError(SmallfryError):
    """Missing, unreadable or incompatible images or labels."""


class AccessError(DataError):
    """Failure to open a file, with no fault of its content."""


class ExportError(SmallfryError):
    """Impossible or unusable export: damaged, foreign, or of another version."""


class ServerError(SmallfryError):
    """Failure to serve: a port in use, an address of another machine, a missing package."""


class SmallfryWarning(UserWarning):
    """Warning of an automatic decision."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, by itself or by what caused it.

    Errors of Python, PyTorch, the system and its loader of shared libraries are recognised.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if _means_out_of_memory(cause):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def _means_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if "Operation not permitted" in (said := str(error)):
        return False  # of the loader, for a disk mounted noexec
    phrases = next((p for kind, p in _PHRASES.items() if isinstance(error, kind)), ())
    return any(words in said for words in phrases)


_LOADER = (  # words of glibc, which has no other sign of it
    *("failed to map segment from shared object", "cannot map zero-fill pages"),
    *("cannot create shared object descriptor", "cannot allocate name record"),
    *("cannot allocate symbol data", "cannot allocate dependency", "Cannot allocate memory"),
)
_PHRASES: dict[type[BaseException], tuple[str, ...]] = {
    RuntimeError: (
        "can't allocate",  # memory, in PyTorch; a lock or a read lock, in Python
        *("not enough memory", "can't start new thread", "bad_alloc"),
        "could not create a primitive",  # oneDNN
    ),
    ImportError: _LOADER,
    OSError: _LOADER,  # of ctypes
}


def refusal(error: OSError) -> str | None:
    """Describe why the system refused a file; None if its name and path are not at fault.

    Other errors of the system are not expected where they come from.
    """
    reasons = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM)
    if error.errno not in (*reasons, errno.EROFS) or error.filename is None:
        return None
    return f"'{error.filename}': {error.strerror}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggest names for an unknown one: ``; did you mean 'digits'?``, or the list of them.

    Capitals make no difference: ``SGD`` is near ``sgd``. An empty name is like none of them.
    """
    known = sorted(names)
    by_letters = {each.lower(): each for each in reversed(known)}
    wanted = name.lower()
    close = [each for each in by_letters.values() if wanted and each.lower().startswith(wanted)]
    close = sorted(close) or [by_letters[k] for k in get_close_matches(wanted, by_letters, n=1)]
    if wanted and close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are {', '.join(known)}" if len(known) <= MOST_NAMED else ""
