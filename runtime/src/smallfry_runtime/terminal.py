"""Safe terminal output of foreign names; all printing goes through here."""

import sys
import unicodedata
from typing import TextIO

KEPT = "\n\t"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line unbuffered, by default to standard output; see ``printable``.

    Text and line end are one write, so that lines of other threads do not get in between.
    """
    print(f"{printable(text)}\n", end="", file=stream or sys.stdout, flush=True)


def escape_unencodable() -> None:
    """Make standard output and error escape characters outside their encoding.

    A Latin-1 terminal, or a pipe under LC_ALL=C, has no "…"; by default, printing one raises
    UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


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
