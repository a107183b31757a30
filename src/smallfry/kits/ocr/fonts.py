"""Font files, and which characters each of them draws.

Without a folder they are matplotlib's own: DejaVu, STIX and Computer Modern. Whole families are
held out for testing.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from smallfry.errors import DataError

__all__ = ["draw_text", "find_fonts", "glyphs"]

TRAIN = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "cmr10", "cmb10"),
)
HELD_OUT = (
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    *("DejaVuSansMono-BoldOblique", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmss10", "cmtt10", "cmti10"),
)
PARTS = 5  # of the families of a folder, of which one is held out
MISSING = "\uffff"  # a character that no font has
PROBE = 24  # pixels, at which characters are compared


def find_fonts(folder: str = "") -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Find the font files to train on, and those of held-out families.

    Args:
        folder: Folder of TTF and OTF files; "" for matplotlib's.

    Raises:
        DataError: The folder is missing, or all its fonts are of families on one side.
    """
    if not folder:
        from matplotlib import get_data_path

        place = Path(get_data_path(), "fonts", "ttf")
        train, held = ([place / f"{name}.ttf" for name in part] for part in (TRAIN, HELD_OUT))
        return tuple(train), tuple(held)
    place = Path(folder).expanduser()
    files = sorted(each for each in place.rglob("*") if each.suffix.lower() in (".ttf", ".otf"))
    sides: tuple[list[Path], list[Path]] = ([], [])
    for file in files:
        family = str(_font(file, PROBE).getname()[0])
        sides[zlib.crc32(family.encode()) % PARTS == 0].append(file)
    if not all(sides):
        raise DataError(
            f"{place}: its {len(files)} fonts (TTF or OTF) are not of families both to train on "
            "and to hold out: add families"
        )
    return tuple(sides[0]), tuple(sides[1])


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


def draw_text(font: ImageFont.FreeTypeFont, text: str) -> NDArray[np.uint8]:
    """Draw a text in white on black, (height, width), as large as its ink."""
    left, top, right, bottom = (round(side) for side in font.getbbox(text))
    image = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
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
