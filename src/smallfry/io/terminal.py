"""What a terminal may be shown of names that others gave; all that is printed goes through here."""

import logging
import shlex
import sys
import unicodedata
from typing import TextIO

KEPT = "\n\t"
LONGEST = 1000  # characters of a message


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, by default on the standard output; see ``printable``.

    Text and line end are one write, so that lines of other threads do not get in between.
    """
    print(f"{printable(text)}\n", end="", file=stream or sys.stdout, flush=True)


class CleanFormatter(logging.Formatter):
    """A log's lines as ``printable``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        return printable(super().format(record))


def printable(text: str) -> str:
    """The text with control characters spelled out, so that none commands the terminal.

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
    """The text without its middle, if it is longer than a message may be."""
    if len(text) <= LONGEST:
        return text
    begin, end = LONGEST * 2 // 3, LONGEST // 4
    return f"{text[:begin]} […] {text[-end:]}"


def escape_unencodable() -> None:
    """Let standard output and error write characters outside their encoding as escapes.

    A Latin-1 terminal, or a pipe under LC_ALL=C, has no "…"; by default, printing one raises
    UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def command(*words: object) -> str:
    """Return a command line that can be pasted into a shell, each word quoted where needed.

    Control characters are spelled out: such a word does not name the same file any more.
    """
    return printable(shlex.join(map(str, words)))
