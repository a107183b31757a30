"""Discovery of input images from files, folders, globs and standard input."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from PIL import Image

from smallfry_runtime.artifacts import is_artifact
from smallfry_runtime.errors import DataError
from smallfry_runtime.files import MOST_TEXT, open_regular
from smallfry_runtime.images import IMAGE_EXTENSIONS, MOST_BYTES, Encoded
from smallfry_runtime.names import text_of

STDIN = "<standard input>"
SYSTEM = (
    frozenset(  # folders and files of systems and their tools, besides those with a leading dot
        {
            *(
                "@eadir",
                "#recycle",
                "#snapshot",
                "@recycle",
                "@recently-snapshot",
                "@tmp",
                "@__thumb",
            ),
            *("$recycle.bin", "recycler", "system volume information", "found.000", "lost+found"),
            *("__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder"),
            *("__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
        }
    )
)
UNREAD = (  # of pictures, but none that are read
    frozenset(
        {
            *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".hdp", ".svg", ".svgz", ".xcf", ".exr"),
            *(".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef"),
            *(".srw", ".raw", ".dcm", ".nii", ".avif", ".webp", ".jp2", ".qoi"),
            *Image.registered_extensions(),
        }
    )
    - IMAGE_EXTENSIONS
    - {".pdf", ".ps", ".h5", ".hdf", ".mpg", ".mpeg", ".im"}  # more often something else
)
NETPBM = re.compile(rb"P[1-6]\s(?:\s|#[^\n]*\n)*\d+\s")  # an image whose bytes may be those of text
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")


InnerSize: TypeAlias = tuple[int, int] | None


class InputImage(NamedTuple):
    """Input image, or the reason of its absence."""

    name: str
    encoded: Encoded | None
    error: str | None = None
    inner: InnerSize = None  # height and width, where the rest of its frame is filling


def find_images(inputs: Sequence[str], stdin: BinaryIO) -> Iterator[InputImage]:
    """Find the images named by files, folders (recursively), globs and ``-``.

    ``-`` is one image, or else a list of inputs, one per line.
    """
    for given in inputs:
        if given == "-":
            yield from _from_stdin(stdin)
        else:
            yield from _from_path(given)


def find_texts(inputs: Sequence[str], stdin: BinaryIO) -> Iterator[InputImage]:
    """Find the texts named by files and globs; ``-`` is a text on standard input."""
    for given in inputs:
        if given == "-":
            yield InputImage(STDIN, stdin.read(MOST_TEXT))
        elif os.path.isdir(os.path.expanduser(given)) and given:
            yield InputImage(given, None, f"{given}: a folder; name its texts, as {given}/*.txt")
        else:
            yield from _from_path(given)


class Listing(NamedTuple):
    """Contents of a folder: its files and folders, sorted by name."""

    images: list[Path]
    others: list[Path]  # files that are no images by their names, without those of the system
    skipped: list[Path]  # folders that hold no pictures to take: a system's, and smallfry's own


def list_folder(folder: Path) -> Listing:
    """List the images and subfolders of a folder, without hidden ones.

    Links are followed, as large sets are often made of them, but into no folder twice and to none
    around this one: links that lead back would have no end.

    Raises:
        DataError: A folder can't be opened.
    """
    found = Listing([], [], [])
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(place)
        below = Path(place) != folder
        if real in seen or (below and is_artifact([*folders, *files])):
            if real not in seen:
                found.skipped.append(Path(place))
            folders.clear()
            continue
        seen.add(real)
        found.skipped.extend(Path(place, name) for name in folders if is_of_the_system(name))
        folders[:] = in_order(name for name in folders if not is_hidden(name))
        for name in in_order(name for name in files if not is_hidden(name)):
            (found.images if is_image(name) else found.others).append(Path(place, name))
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names alike on every system, however it encodes accents."""
    return sorted(names, key=lambda name: (text_of(name), name))


def unread_pictures(files: Iterable[Path]) -> list[Path]:
    """Return pictures in unsupported formats, by extension or, without one, by first bytes."""
    return [file for file in files if _is_unread_picture(file)]


def _is_unread_picture(file: Path) -> bool:
    if file.suffix:
        return file.suffix.lower() in UNREAD
    try:
        with open_regular(file, MOST_BYTES) as stream:
            return stream.read(8).startswith(SIGNATURES)
    except OSError:
        return False


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: this folder can't be opened ({error.strerror}); change its "
        f"permissions, or remove the folder"
    ) from error


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or belongs to the system or its tools."""
    return name.startswith(".") or is_of_the_system(name)


def is_of_the_system(name: str) -> bool:
    """Return whether a name is one that systems and their tools create, such as ``@eaDir``."""
    return name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image, and not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_EXTENSIONS


def _from_path(given: str) -> Iterator[InputImage]:
    place = os.path.expanduser(given)  # where Path's own would raise, as at a file named ~a.png
    path = Path(place)
    if not given:  # which is the current folder to pathlib
        yield InputImage(given, None, "an input has no name; expected a file or folder")
    elif os.path.isfile(place):
        yield InputImage(given, path)
    elif os.path.isdir(place):
        try:
            images, others, _ = list_folder(path)
        except DataError as error:
            yield InputImage(given, None, str(error))
            return
        unread = unread_pictures(others)
        yield from (InputImage(str(file), file) for file in images)
        for file in unread:
            yield InputImage(str(file), None, f"{file}: of a format that is not read; convert it")
        if not images and not unread:
            yield InputImage(given, None, f"{given}: there are no images in this folder")
    else:
        matches = _matches(place) if glob.has_magic(place) else []
        for match in matches:
            yield from _from_path(match)
        if not matches:
            yield InputImage(given, None, f"{given}: there is no such file or folder")


def _matches(pattern: str) -> list[str]:
    """Return the files that match a pattern, or one below a folder named like a pattern."""
    found = glob.glob(pattern, recursive=True)
    above = next((path for path in Path(pattern).parents if path.is_dir()), None)
    if not found and above is not None:
        rest = Path(pattern).relative_to(above)
        found = glob.glob(os.path.join(glob.escape(str(above)), rest), recursive=True)
    return sorted(found)


def _from_stdin(stdin: BinaryIO) -> Iterator[InputImage]:
    content = stdin.read()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        lines = None
    if lines is None or b"\0" in content or NETPBM.match(content):  # no list, but an image
        yield InputImage(STDIN, content)
        return
    inputs = [line.strip() for line in lines if line.strip()]
    if not inputs:
        yield InputImage(STDIN, None, f"{STDIN}: empty; expected an image, or one file per line")
    for line in inputs:
        yield from _from_path(line)
