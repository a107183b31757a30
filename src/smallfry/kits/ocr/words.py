"""Generated words: random strings in many fonts, with the text as exact ground truth.

Word *i* of a split is a function of the settings, the split and *i* alone. Test words are drawn in
families of fonts that training has none of, and no string is both a training and a test word.
Training words vary more: they are wider or narrower, spaced, slanted, thicker and thinner. Each
picture is as large as its word and fitted into the image as the runtime fits a user's picture.
"""

import io
import string
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageFont

from smallfry.data import ImageData, Split
from smallfry.data.cache import decoded
from smallfry.data.fingerprint import digest
from smallfry.data.philox import generator
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.data.sources import EncodedSplit
from smallfry.errors import UsageError
from smallfry.kits.ocr.folder import STEP, text_frame
from smallfry.kits.ocr.fonts import PACKAGES, draw_text, family, find_fonts, glyphs, load_font
from smallfry_runtime.frames import Frame

__all__ = ["WordSettings", "draw_word"]

VERSION = 2  # changes whenever the words of a seed do
TEST = 5  # parts of all strings, of which one is tested
SIZES = (17, 25)  # pixels of fonts
SHEAR = 0.2  # most of test words, columns per row
VARIED = 0.3  # most change in width of training words, as a share; and what is added to their shear
SPACED = 0.3  # share of training words with characters apart
TRIES = 10_000  # strings of a word, of which one has to be of its split
STROKES = 0.2  # share of training words with thicker strokes; as many have thinner ones
ALPHABETS = {
    "digits": string.digits,
    "letters": string.ascii_lowercase,
    "both": string.digits + string.ascii_lowercase,
}


@dataclass(frozen=True, kw_only=True)
class WordSettings:
    """Settings of generated words, in ``data.options``.

    Args:
        words: Words of all splits together.
        alphabet: Their characters, or ``digits``, ``letters`` or ``both``.
        shortest: Characters of the shortest word.
        longest: Of the longest.
        level: ``full``, or ``easy`` without blur, noise, JPEG and gradients.
        fonts: Folder of font files; "" for matplotlib's; ``packages`` adds those of installed
            packages of fonts (``pip install smallfry[ocr]``) to training.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    words: int = 12_000
    alphabet: str = "both"
    shortest: int = 2
    longest: int = 8
    level: str = "full"
    fonts: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 10 <= self.words <= 10_000_000:
            raise UsageError(f"data.options.words is 10 to 10,000,000, got {self.words}")
        if len({*self.characters}) < 2 or len({*self.characters}) != len(self.characters):
            raise UsageError("data.options.alphabet has two characters or more, each once")
        if not 1 <= self.shortest <= self.longest:
            raise UsageError(
                f"data.options.shortest is 1 to longest, got {self.shortest} and {self.longest}"
            )
        if self.level not in ("full", "easy"):
            raise UsageError(f"data.options.level is full or easy, got '{self.level}'")

    @property
    def characters(self) -> str:
        """Characters of the alphabet."""
        return ALPHABETS.get(self.alphabet, self.alphabet)


def read_words(name: str, wanted: Wanted) -> ImageData:
    """Generate words, or take them from the cache.

    Args:
        name: The name of the data set.
        wanted: Its options, and shares held out for validation, in training fonts, and for testing.

    Raises:
        UsageError: A setting that does not apply, or characters that no font has.
    """
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root: see ocr-folder")
    settings: WordSettings = settings_from(WordSettings, wanted.options)
    frame = text_frame(name, wanted)
    if 2 * settings.longest * STEP > frame.width:  # with a blank between any two symbols
        raise UsageError(
            f"data.options.longest {settings.longest} needs images {2 * settings.longest * STEP} "
            f"pixels wide, not {frame.width}: lower it, or raise data.image_size"
        )
    tested = round(wanted.test * settings.words)
    everything = _split(settings, frame, "train", settings.words - tested)
    count = round(wanted.validation * len(everything))
    chosen = torch.arange(len(everything))
    kept = chosen[count:][: wanted.limit]
    return ImageData(
        name,
        "generated",
        ("", *settings.characters),
        frame.size,
        1,
        everything.take(kept),
        everything.take(chosen[:count]),
        _split(settings, frame, "test", tested),
        generated={"family": name, "version": VERSION, **asdict(settings)},
        resize=frame.resize,
        has_symbols=True,
    )


def _split(settings: WordSettings, frame: Frame, split: str, count: int) -> Split:
    fonts = find_fonts(settings.fonts)[split == "test"]
    labels = np.zeros((count, settings.longest), np.int64)
    for number in range(count):
        text = _text(_random(settings, split, number), settings, split, fonts)[0]
        labels[number, : len(text)] = [settings.characters.index(each) + 1 for each in text]
    if count == 0:
        pixels = torch.zeros(0, *frame.shape(1), dtype=torch.uint8)
        return Split(pixels, torch.arange(0), torch.from_numpy(labels))
    drawn = {k: v for k, v in asdict(settings).items() if k != "words"}
    if settings.fonts == PACKAGES:
        drawn["files"] = [file.name for file in fonts]
    encoded = EncodedSplit(
        np.zeros(count, np.int64),
        lambda number: draw_word(settings, split, number)[0],
        lambda number: f"{split} word {number}",
        digest("ocr-words", repr(drawn), split, str(count), str(VERSION)),
    )
    images = decoded(encoded, frame, 1).images
    return Split(torch.from_numpy(images), torch.arange(count), torch.from_numpy(labels))


def draw_word(
    settings: WordSettings, split: str, number: int
) -> tuple[NDArray[np.uint8], str, Path]:
    """Draw a word.

    Args:
        settings: The settings.
        split: ``train``, of which validation is a part, or ``test``.
        number: The number of the word in its split.

    Returns:
        Pixels (1, height, width) as large as the word, its text, and the font file.
    """
    random = _random(settings, split, number)
    fonts = find_fonts(settings.fonts)[split == "test"]
    text, file = _text(random, settings, split, fonts)
    font = load_font([file], 0, int(random.integers(SIZES[0], SIZES[1] + 1)))
    varied = split == "train"
    mask = _varied(font, text, random) if varied else draw_text(font, text)
    mask = _transformed(mask, random, SHEAR + VARIED * varied)
    margins = random.integers(0, 9, 4)
    mask = np.pad(mask, ((margins[0], margins[1]), (margins[2], margins[3])))
    paper = random.uniform(0, 1)
    ink = random.uniform(0, 1)
    if abs(ink - paper) < 0.35:
        ink = (paper + random.uniform(0.35, 0.65)) % 1.0
        ink = ink if abs(ink - paper) >= 0.35 else float(paper < 0.5)
    shade = np.full(mask.shape, paper)
    if settings.level == "full" and random.random() < 0.5:
        slope = random.uniform(-0.15, 0.15, 2)
        rows, columns = (np.linspace(-1, 1, n) for n in mask.shape)
        shade = shade + slope[0] * rows[:, None] + slope[1] * columns
    share = mask / 255.0
    pixels = np.clip(shade * (1 - share) + ink * share, 0, 1)
    if settings.level == "full":
        pixels = _worn(pixels, random)
    return np.rint(pixels * 255).astype(np.uint8)[None], text, file


def _random(settings: WordSettings, split: str, number: int) -> np.random.Generator:
    return generator(f"ocr-words {VERSION} {split}", settings.seed, number)


def _text(
    random: np.random.Generator, settings: WordSettings, split: str, fonts: tuple[Path, ...]
) -> tuple[str, Path]:
    """Draw a string of a split, and a font that has its characters."""
    families = _families(fonts)
    for _ in range(TRIES):
        faces = families[int(random.integers(len(families)))]
        file = faces[int(random.integers(len(faces)))]
        known = glyphs(file, settings.characters)
        length = int(random.integers(settings.shortest, settings.longest + 1))
        if not known:
            continue
        text = "".join(known[int(i)] for i in random.integers(len(known), size=length))
        if (zlib.crc32(text.encode()) % TEST == 0) == (split == "test"):
            return text, file
    raise UsageError(
        f"no {split} words of {settings.shortest} to {settings.longest} characters of "
        f"'{settings.characters}' can be drawn: the fonts have none of the characters, or too few "
        "for words of both splits; take others, or longer words"
    )


@lru_cache(maxsize=8)
def _families(fonts: tuple[Path, ...]) -> tuple[tuple[Path, ...], ...]:
    """Group fonts by family, so that a family of many faces is not drawn more often."""
    faces: dict[str, list[Path]] = {}
    for file in fonts:
        faces.setdefault(family(file), []).append(file)
    return tuple(tuple(each) for each in faces.values())


def _varied(
    font: ImageFont.FreeTypeFont, text: str, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw a text with other widths, distances and strokes than the font's."""
    gap = int(random.integers(1, 4)) if random.random() < SPACED else 0
    image = Image.fromarray(draw_text(font, text, gap))
    strokes = random.random()
    if strokes < 2 * STROKES:
        stronger = ImageFilter.MaxFilter if strokes < STROKES else ImageFilter.MinFilter
        grown = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR)
        changed = grown.filter(stronger(3)).resize(image.size)
        if 2 * np.asarray(changed).sum() >= np.asarray(image).sum():  # else strokes vanish
            image = changed
    wide = max(1, round(image.width * random.uniform(1 - VARIED, 1 + VARIED)))
    return np.asarray(image.resize((wide, image.height), Image.Resampling.BILINEAR))


def _transformed(
    mask: NDArray[np.uint8], random: np.random.Generator, most: float
) -> NDArray[np.uint8]:
    """Shear a mask by up to ``most``, and turn it by up to 4 degrees."""
    height, width = mask.shape
    shear = random.uniform(-most, most)
    wide = width + int(np.ceil(abs(shear) * height))
    image = Image.fromarray(mask).transform(
        (wide, height),
        Image.Transform.AFFINE,
        (1, -shear, min(0.0, shear * height), 0, 1, 0),  # from places in the result to the mask's
        Image.Resampling.BILINEAR,
    )
    angle = float(random.uniform(-4, 4))
    turned = np.asarray(image.rotate(angle, Image.Resampling.BILINEAR, expand=True))
    rows, columns = (np.flatnonzero(turned.max(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return mask
    return turned[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _worn(pixels: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """Blur, add noise, and compress, each to a random degree."""
    image = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0, 0.8))))
    noise = random.normal(0, random.uniform(0, 0.08), pixels.shape)
    found = np.clip(np.asarray(image) / 255 + noise, 0, 1)
    if random.random() < 0.5:
        stream = io.BytesIO()
        Image.fromarray(np.rint(found * 255).astype(np.uint8)).save(
            stream, "JPEG", quality=int(random.integers(40, 96))
        )
        found = np.asarray(Image.open(stream)) / 255
    return np.asarray(found)


register_data(("ocr-words",), read_words)
