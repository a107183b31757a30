"""Font files, and which characters each of them draws.

Without a folder they are matplotlib's own: DejaVu, STIX and Computer Modern; with ``packages`` also
those of installed Python packages of fonts. Whole families are held out for testing.
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from smallfry.errors import DataError

__all__ = ["PACKAGES", "draw_text", "family", "find_fonts", "glyphs"]

PACKAGES = "packages"  # in place of a folder: also fonts of installed packages

TRAIN = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("cmr10", "cmb10"),
)
HELD_OUT = (
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    *("DejaVuSansMono-BoldOblique", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("STIXGeneralBolIta",),
    *("cmss10", "cmtt10", "cmti10"),
)
PARTS = 5  # of the families of a folder, of which one is held out
MISSING = "\uffff"  # a character that no font has
PROBE = 24  # pixels, at which characters are compared


@lru_cache(maxsize=8)  # called for each word, and packages take long to list
def find_fonts(folder: str = "") -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Find the font files to train on, and those of held-out families.

    Args:
        folder: Folder of TTF and OTF files; "" for matplotlib's; ``packages`` adds those of
            installed Python packages of fonts to train on.

    Raises:
        DataError: The folder is missing, all its fonts are of families on one side, or no package
            of fonts is installed.
    """
    if folder in ("", PACKAGES):
        from matplotlib import get_data_path

        place = Path(get_data_path(), "fonts", "ttf")
        train, held = ([place / f"{name}.ttf" for name in part] for part in (TRAIN, HELD_OUT))
        if folder:
            train += _packaged({family(file) for file in held})
        return tuple(train), tuple(held)
    place = Path(folder).expanduser()
    files = sorted(each for each in place.rglob("*") if each.suffix.lower() in (".ttf", ".otf"))
    sides: tuple[list[Path], list[Path]] = ([], [])
    for file in files:
        sides[zlib.crc32(family(file).encode()) % PARTS == 0].append(file)
    if not all(sides):
        raise DataError(
            f"{place}: its {len(files)} fonts (TTF or OTF) are not of families both to train on "
            "and to hold out: add families"
        )
    return tuple(sides[0]), tuple(sides[1])


def family(file: Path) -> str:
    """Return the name of a font's family."""
    return str(_font(file, PROBE).getname()[0])


def _packaged(held: set[str]) -> list[Path]:
    """List the fonts of installed packages, one file of each face, but for held-out families.

    Packages of fonts are those with entry points ``fonts_ttf`` or ``fonts_otf``, as of
    ``pip install smallfry[ocr]``; no code of theirs runs.
    """
    faces: dict[tuple[str, str], Path] = {}
    for file in sorted(_files(), key=lambda each: each.name):
        name, style = _font(file, PROBE).getname()
        if str(name) not in held:
            faces.setdefault((str(name), str(style)), file)
    if not faces:
        raise DataError(
            "no package of fonts is installed: pip install smallfry[ocr], or give a folder of "
            "fonts in data.options.fonts"
        )
    return [faces[key] for key in sorted(faces)]


def _files() -> Iterator[Path]:
    for package in metadata.distributions():
        if any(each.group in ("fonts_ttf", "fonts_otf") for each in package.entry_points):
            for file in package.files or ():
                if file.suffix.lower() in (".ttf", ".otf"):
                    yield Path(str(package.locate_file(file)))


@lru_cache(maxsize=4096)
def glyphs(file: Path, characters: str) -> str:
    """Return those of some characters that a font draws, neither empty nor as its missing one."""
    font = _font(file, PROBE)
    missing = draw_text(font, MISSING).tobytes()
    return "".join(
        each
        for each in characters
        if (mask := draw_text(font, each)).any() and mask.tobytes() != missing
    )


def draw_text(font: ImageFont.FreeTypeFont, text: str, gap: int = 0) -> NDArray[np.uint8]:
    """Draw a text in white on black, (height, width), as large as its box.

    Args:
        font: The font.
        text: The text.
        gap: Pixels more between characters.
    """
    left, top, right, bottom = (round(side) for side in font.getbbox(text))
    size = (max(1, right - left + gap * (len(text) - 1)), max(1, bottom - top))
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    if not gap:
        draw.text((-left, -top), text, fill=255, font=font)
    for i, each in enumerate(text if gap else ""):
        place = font.getlength(text[:i]) + gap * i
        draw.text((place - left, -top), each, fill=255, font=font)
    return np.asarray(image)


def load_font(files: Sequence[Path], number: int, size: int) -> ImageFont.FreeTypeFont:
    """Load one of several font files in a size of pixels."""
    return _font(files[number], size)


@lru_cache(maxsize=512)
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(file), size)
    except OSError as error:
        raise DataError(f"{file}: not a readable font ({error})") from error
