"""Log format and encodings of terminal output."""

import logging
import shlex

from smallfry_runtime.terminal import escape_unencodable as escape_unencodable
from smallfry_runtime.terminal import printable as printable
from smallfry_runtime.terminal import say as say


class CleanFormatter(logging.Formatter):
    """Log formatter with ``printable`` text."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return printable(super().format(record))


def command(*words: object) -> str:
    """Quote a command line for pasting into a shell.

    Control characters are spelled out: such a word does not name the same file any more.
    """
    return printable(shlex.join(map(str, words)))
