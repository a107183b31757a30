"""Fuzzed image files: each decodes to pixels, or is refused in one sentence."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from campaign.trials import RIGHT, TOLD, Part, Verdict, generator
from smallfry.errors import DataError
from smallfry_runtime.images import READ, decode, header

SAVED = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
SAVED += ("PCX", "SGI", "QOI", "DIB")
FOREIGN = ("EPS", "PDF", "ICNS", "DDS", "IM", "SPIDER", "MSP", "XBM", "BLP")  # not to be read
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F")
EXIF_ROTATION = 0x0112


def prepare(folder: Path) -> Path:
    """Create a folder for the files."""
    Image.init()
    return folder


def trial(folder: Path, number: int) -> Verdict:
    """Make one file, perhaps damage it, and read it as bytes or from the disk."""
    random = generator("images", number)
    make = random.choices([whole_file, CRAFTED[number % len(CRAFTED)]], (3, 1))[0]
    kind, data = make(random)
    if make is whole_file and random.random() < 0.85:
        kind, data = damaged(kind, data, random)
    size, channels = random.choice((1, 8, 32, 224)), random.choice((1, 3))
    encoded: bytes | Path = data
    if number % 4 == 0:
        encoded = folder / "file"
        encoded.write_bytes(data)
    try:
        header(encoded, "x")
    except DataError as error:
        if "\n" in str(error):
            return Verdict(kind, TOLD, f"the message has several lines: {error!r}"[:300])
    try:
        pixels = decode(encoded, "x", size, channels, 16)
    except DataError as error:
        whole = kind in MUST_BE_READ
        return Verdict(kind, TOLD, f"a right file is refused: {error}" if whole else None)
    wrong = pixels.shape != (channels, size, size) or pixels.dtype != np.uint8
    failure = "pixels of another shape" if wrong else None
    if kind in MUST_BE_REFUSED:
        failure = "it was read"
    return Verdict(kind, RIGHT, failure)


# Files that are what they say


def whole_file(random: Random) -> tuple[str, bytes]:
    """Write a valid file of any format, mode and extras that this Pillow supports."""
    format = random.choice([name for name in SAVED if name in Image.SAVE])
    if random.random() < 0.05:
        format = random.choice([name for name in FOREIGN if name in Image.SAVE])
    mode = random.choice(MODES)
    side = random.choice(((1, 1), (8, 8), (31, 17), (64, 64), (200, 3)))
    image = _picture(random, mode, side)
    options = {}
    if random.random() < 0.4:
        exif = Image.Exif()
        exif[EXIF_ROTATION] = random.choice((*range(10), 65535))
        options["exif"] = exif.tobytes() if random.random() < 0.7 else random.randbytes(30)
    if random.random() < 0.3:
        options["icc_profile"] = random.randbytes(random.choice((0, 3, 128, 5000)))
    if random.random() < 0.3 and format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        frames = [_picture(random, mode, side) for _ in range(random.choice((1, 3, 12)))]
        options |= {"save_all": True, "append_images": frames, "duration": 10}
    if format == "AVIF":
        options = {}  # with which Pillow's own encoder crashes
    for wanted in (mode, "RGB", "L"):
        try:
            buffer = BytesIO()
            (image if wanted == mode else image.convert(wanted)).save(buffer, format, **options)
            Image.open(BytesIO(buffer.getvalue())).load()  # Pillow writes some that are none
        except Exception:  # not every format holds every mode with all extras
            options = {} if wanted == "RGB" else options
            continue
        name = "whole file of wide numbers" if wanted in ("I", "F") else "whole file"
        name = name if format in READ else "file of another format"
        return name, buffer.getvalue()
    return "no file", b""


def _picture(random: Random, mode: str, size: tuple[int, int]) -> Image.Image:
    width, height = size
    if mode == "I;16":
        values = np.frombuffer(random.randbytes(2 * width * height), np.uint16)
        return Image.fromarray(values.reshape(height, width))
    data = random.randbytes(3 * width * height)
    image = Image.frombytes("RGB", size, data)
    if mode == "LAB":
        return image
    if mode == "LA":
        return image.convert("RGBA").convert("LA")
    return image.quantize(random.choice((2, 16, 256))) if mode == "P" else image.convert(mode)


def damaged(kind: str, data: bytes, random: Random) -> tuple[str, bytes]:
    """Damage the bytes of a file."""
    if not data:
        return kind, data
    content = bytearray(data)
    way = random.randrange(6)
    if way == 0:
        return "truncated", bytes(content[: random.randrange(len(content))])
    if way == 1:
        for _ in range(random.choice((1, 1, 2, 8, 64))):
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        return "bits flipped", bytes(content)
    if way == 2:
        for _ in range(random.choice((1, 2, 4))):
            content[random.randrange(min(64, len(content)))] = random.randrange(256)
        return "header overwritten", bytes(content)
    if way == 3:
        at = random.randrange(len(content))
        value = random.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF))
        content[at : at + 4] = struct.pack(random.choice("<>") + "I", value)
        return "numbers overwritten", bytes(content)
    if way == 4:
        start = random.randrange(len(content))
        piece = content[start : start + random.randrange(1, 200)]
        at = random.randrange(len(content))
        content[at:at] = piece * random.choice((1, 2, 50))
        return "pieces repeated", bytes(content)
    head = random.choice((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\0", b"BM"))
    return "another format's head", head + bytes(content[len(head) :])


# Files that are made to harm


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *extra: bytes, depth: int = 8, color: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    signed = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head)
    return signed + b"".join(extra) + pixels + _chunk(b"IEND", b"")


def absurd_png(random: Random) -> tuple[str, bytes]:
    """Build a PNG of up to 2^62 pixels in a kilobyte."""
    side = random.choice((2**31 - 1, 2**30, 100_000, 2**32 - 1))
    return "absurd size", _png(side, random.choice((side, 1_000_000)))


def absurd_gif(random: Random) -> tuple[str, bytes]:
    """Build a GIF of 65535 by 65535 pixels without data."""
    head = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF0, 0, 0) + b"\0\0\0\xff\xff\xff"
    return "absurd size", head + b"," + struct.pack(
        "<HHHHB", 0, 0, 65535, 65535, 0
    ) + b"\2\2\x44\1\0;"


def absurd_bmp(random: Random) -> tuple[str, bytes]:
    """Build a bitmap of 2^31 by 2^31 pixels."""
    width, height = random.choice(((2**31 - 1, 2**31 - 1), (-1, 2**30), (2**16, 2**16)))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return "absurd size", b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + info + b"\0" * 100


def absurd_tiff(random: Random) -> tuple[str, bytes]:
    """Build a TIFF whose tags hold impossible sizes, counts and offsets."""
    tags = [
        (256, 4, 1, random.choice((2**31, 2**16, 8))),
        (257, 4, 1, random.choice((2**31, 2**16, 8))),
        (258, 3, random.choice((1, 2**30)), 8),
        (259, 3, 1, random.choice((1, 5, 7, 8, 32773))),
        (262, 3, 1, 1),
        (273, 4, random.choice((1, 2**28)), random.choice((8, 2**31))),
        (277, 3, 1, random.choice((1, 65535))),
        (278, 4, 1, 2**31),
        (279, 4, 1, 2**31),
    ]
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return "absurd size", b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + b"\0" * 64


def packed_text(random: Random) -> tuple[str, bytes]:
    """Build a PNG with text chunks that unpack to 64 MiB each."""
    bomb = zlib.compress(bytes(64 * 2**20), 9)
    chunk = random.choice((_chunk(b"iCCP", b"a\0\0" + bomb), _chunk(b"zTXt", b"a\0\0" + bomb)))
    return "packed text", _png(8, 8, *[chunk] * random.choice((1, 20)))


def packed_pixels(random: Random) -> tuple[str, bytes]:
    """Build a PNG of a few kilobytes with about the largest allowed number of pixels."""
    height = random.choice((2_900, 89_000, 90_000))
    width = 1_000 if height > 3_000 else 30_000
    data = zlib.compress(bytes((width + 1) * height), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head)
    kind = "too many pixels" if width * height > 89_478_485 else "as many pixels as are read"
    return kind, start + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def packed_tile(random: Random) -> tuple[str, bytes]:
    """Build a TIFF of 16 by 16 pixels in one tile that unpacks to hundreds of megabytes."""
    side, bits = random.choice(((20_000, 8), (20_000, 16), (30_000, 16)))
    data = _zeros(side * side * bits // 8)
    tags = [(256, 16), (257, 16), (258, bits), (259, 8), (262, 1), (277, 1)]
    tags += [(322, side), (323, side), (324, 8), (325, len(data))]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<4sI", b"II*\0", 8 + len(data))
    return "packed tile", head + data + struct.pack("<H", len(tags)) + body + bytes(4)


def packed_icon(random: Random) -> tuple[str, bytes]:
    """Build an icon of 16 by 16 pixels whose image has 100 to 170 megapixels."""
    side = random.choice((10_000, 13_000))
    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head)
    inner = start + _chunk(b"IDAT", _zeros(side * (4 * side + 1))) + _chunk(b"IEND", b"")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return "packed icon", b"\0\0\1\0\1\0" + entry + inner


def packed_colour(random: Random) -> tuple[str, bytes]:
    """Build 32 megapixels with transparency, palette or 16 bits in some kilobytes."""
    side = 5_700
    depth, colour, width = random.choice(((8, 6, 4), (8, 3, 1), (16, 0, 2), (16, 2, 6)))
    palette = _chunk(b"PLTE", bytes(range(6))) + _chunk(b"tRNS", b"\0") if colour == 3 else b""
    head = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + palette
    pixels = _chunk(b"IDAT", _zeros(side * (width * side + 1)))
    return "as many pixels as are read", start + pixels + _chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    """Compress a number of zeros, chunk by chunk."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(bytes(2**20)) for _ in range(count // 2**20)]
    return b"".join([*parts, packer.compress(bytes(count % 2**20)), packer.flush()])


def many_frames(random: Random) -> tuple[str, bytes]:
    """Build an animation of hundreds of frames."""
    frames = [Image.new("P", (16, 16), i % 256) for i in range(300)]
    buffer = BytesIO()
    frames[0].save(buffer, random.choice(("GIF", "PNG")), save_all=True, append_images=frames[1:])
    return "animation", buffer.getvalue()


def any_bytes(random: Random) -> tuple[str, bytes]:
    """Write noise, text, a program, or nothing."""
    said = (
        b"",
        b"\0",
        b"<svg onload=alert(1)>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    )
    return "no image", random.choice((*said, random.randbytes(random.randrange(5_000))))


CRAFTED: tuple[Callable[[Random], tuple[str, bytes]], ...] = (
    *(packed_tile, packed_icon, packed_colour) * 2,  # first, so that the short form has some
    *(absurd_png, absurd_gif, absurd_bmp, absurd_tiff),
    *(any_bytes, many_frames) * 2,
    *(absurd_png, absurd_gif, absurd_bmp, absurd_tiff, any_bytes) * 60,
    *(packed_text, packed_pixels),  # which take a second each
)
MUST_BE_READ = ("whole file", "animation", "as many pixels as are read")
MUST_BE_REFUSED = (
    *("no image", "too many pixels", "file of another format", "packed tile", "packed icon"),
)

PART = Part(
    "images",
    "pixels of the requested size, or an error in one sentence; 2 GiB of memory at most",
    prepare,
    trial,
    count=100_000,
    short=100,
    seconds=600,
    memory=6 * 2**30,
)
