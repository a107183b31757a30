"""Which images are meant by files, folders, globs and standard input."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from smallfry.images import IMAGE_EXTENSIONS, Encoded

STDIN = "<standard input>"


class Found(NamedTuple):
    """An image, or why there is none."""

    name: str
    encoded: Encoded | None
    error: str | None = None


def find_images(inputs: Sequence[str], stdin: BinaryIO) -> Iterator[Found]:
    """The images that files, folders (searched through), globs and ``-`` name.

    ``-`` is one image, or else a list of inputs, one per line.
    """
    for given in inputs:
        if given == "-":
            yield from _from_stdin(stdin)
        else:
            yield from _from_path(given)


def images_below(folder: Path) -> list[Path]:
    """All images in a folder and its folders; hidden ones are not meant.

    Links are followed, as large sets are often made of them, but into no folder twice: links that
    lead back would have no end.
    """
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(files) if is_image(name)]
    return found


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image, and not a hidden one."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_EXTENSIONS


def _from_path(given: str) -> Iterator[Found]:
    path = Path(given).expanduser()
    if path.is_file():
        yield Found(given, path)
    elif path.is_dir():
        files = images_below(path)
        yield from (Found(str(file), file) for file in files)
        if not files:
            yield Found(given, None, f"{given}: there are no images in this folder")
    else:
        matches = sorted(glob.glob(given, recursive=True)) if glob.has_magic(given) else []
        for match in matches:
            yield from _from_path(match)
        if not matches:
            yield Found(given, None, f"{given}: there is no such file or folder")


def _from_stdin(stdin: BinaryIO) -> Iterator[Found]:
    content = stdin.read()
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:  # no text, so it is meant to be an image
        yield Found(STDIN, content)
        return
    inputs = [line.strip() for line in lines if line.strip()]
    if not inputs:
        yield Found(STDIN, None, f"{STDIN}: empty; expected an image, or one file per line")
    for line in inputs:
        yield from _from_path(line)
