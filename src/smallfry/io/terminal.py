"""Safe terminal output of foreign names; all printing goes through here."""

import logging
import shlex
import sys
import unicodedata
from typing import TextIO

KEPT = "\n\t"
LONGEST = 1000  # characters of a message


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line unbuffered, by default to standard output; see ``printable``.

    Text and line end are one write, so that lines of other threads do not get in between.
    """
    print(f"{printable(text)}\n", end="", file=stream or sys.stdout, flush=True)


class CleanFormatter(logging.Formatter):
    """Log formatter that applies ``printable``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return printable(super().format(record))


def printable(text: str) -> str:
    """Escape control characters in a text, so that it can't control the terminal.

    Also of the right-to-left kind, which let a name be read as another: ``\\x1b``, ``\\u202e``.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character in KEPT or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def shortened(text: str) -> str:
    """Cut the middle out of a text too long for a message."""
    if len(text) <= LONGEST:
        return text
    begin, end = LONGEST * 2 // 3, LONGEST // 4
    return f"{text[:begin]} […] {text[-end:]}"


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
