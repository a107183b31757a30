"""Normalisation of file and class names across systems."""

import os
import unicodedata
from pathlib import Path
from urllib.parse import unquote_to_bytes

URI = "file://"


def text_of(name: str) -> str:
    """Normalise a file name to composed Unicode (NFC), valid in JSON, pictures and reports.

    A name whose bytes are not UTF-8, as archives of older systems have them, is read as Latin-1.
    """
    if name.isascii():
        return name
    try:
        name.encode()
    except UnicodeEncodeError:  # Python keeps such bytes as lone surrogates
        name = os.fsencode(name).decode("latin-1")
    return unicodedata.normalize("NFC", name)


def path_of(name: str) -> Path:
    """Resolve a path given by a user or a configuration, with ``~`` or as ``file:///…``."""
    if name.startswith(URI):
        return Path(os.fsdecode(unquote_to_bytes(name.removeprefix(URI))))
    return Path(os.path.expanduser(name))  # as it is, where the user has no home


def storable(path: str) -> str:
    """Encode a path for YAML: as it is, or as ``file:///…`` if its bytes are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).absolute().as_uri()
    return path
