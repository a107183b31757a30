"""Log format and encodings of terminal output."""

import logging
import shlex
import sys

from smallfry_runtime.terminal import printable as printable
from smallfry_runtime.terminal import say as say


class CleanFormatter(logging.Formatter):
    """Log formatter with ``printable`` text."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return printable(super().format(record))


def escape_unencodable() -> None:
    """Make standard output and error escape characters outside their encoding.

    A Latin-1 terminal, or a pipe under LC_ALL=C, has no "…"; by default, printing one raises
    UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def command(*words: object) -> str:
    """Quote a command line for pasting into a shell.

    Control characters are spelled out: such a word does not name the same file any more.
    """
    return printable(shlex.join(map(str, words)))
