"""Pictures of rare modes, depths, sizes and formats, and every kind of damage to them."""

import os
import struct
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from smallfry_runtime.decoding import IMAGE_MIB, MOST_PIXELS, most_pixels
from smallfry_runtime.errors import DataError, UsageError
from smallfry_runtime.frames import Frame
from smallfry_runtime.images import (
    MOST_BYTES,
    READ,
    decode,
    header,
    is_bit_depth,
    peak_of,
    refit,
)

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (6, 4, 3), np.uint8)


def encoded(image, format="PNG", **settings) -> bytes:
    stream = BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


def png(values, colour_type: int, transparent=()) -> bytes:
    """A PNG of 16 bits a channel, of kinds that Pillow reads and does not write."""
    rows = values.reshape(len(values), -1).astype(">u2")
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">2I5B", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(content)), (b"IEND", b"")]
    if transparent:
        chunks.insert(1, (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


TURNS = {  # of a stored picture to the one that is seen, by its EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", [*TURNS, 0, 9, 300])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_each_exif_orientation_is_undone(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if format == "WEBP" else {}
    content = encoded(Image.fromarray(COLOURS), format, exif=exif, **settings)
    seen = TURNS.get(orientation, TURNS[1])(COLOURS)
    found = decode(content, "x", Frame(*seen.shape[:2]), 3)
    assert np.array_equal(found.transpose(1, 2, 0), seen)
    assert header(content, "x") == (*seen.shape[1::-1], False)


@pytest.mark.parametrize("orientation", TURNS)
def test_the_header_of_a_photo_has_the_size_that_decoding_gives(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.new("RGB", (8, 16), (255, 0, 0))
    photo.paste((0, 0, 255), (0, 0, 8, 8))
    content = encoded(photo, "JPEG", exif=exif, quality=95, subsampling=0)
    width, height, _ = header(content, "x")
    found = decode(content, "x", (height, width), 3).transpose(1, 2, 0)
    wanted = TURNS[orientation](np.asarray(photo))
    assert np.abs(found.astype(int) - wanted).max() < 10


def test_an_image_of_pillow_is_turned_in_a_copy():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(BytesIO(encoded(Image.fromarray(COLOURS), exif=exif)))
    found = decode(image, "x", Frame(4, 6), 3)
    assert np.array_equal(found.transpose(1, 2, 0), TURNS[6](COLOURS))
    assert image.size == (4, 6)
    assert image.getexif()[0x0112] == 6
    assert np.array_equal(np.asarray(image), COLOURS)


def over_white(colour, alpha):
    return [round(alpha / 255 * value + 255 - alpha) for value in colour]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [255] * 3),
        ("L", 77, [77] * 3),
        ("LA", (120, 128), over_white([120] * 3, 128)),
        ("La", (60, 128), over_white([120] * 3, 128)),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBX", (1, 2, 3, 4), [1, 2, 3]),
        ("RGBA", (10, 200, 30, 64), over_white([10, 200, 30], 64)),
        ("RGBA", (10, 200, 30, 0), [255] * 3),
        ("RGBa", (32, 64, 16, 64), over_white([127.5, 255, 63.75], 64)),
        ("CMYK", (0, 255, 0, 0), [255, 0, 255]),
        ("CMYK", (0, 0, 0, 255), [0, 0, 0]),
        ("YCbCr", (76, 85, 255), [254, 0, 0]),
        ("HSV", (0, 0, 128), [128] * 3),
        ("HSV", (85, 255, 255), [0, 255, 0]),
        ("LAB", (255, 128, 128), [255] * 3),
        ("I", 65535, [255] * 3),
        ("I;16", 40000, [40000 // 257] * 3),
        ("I;16B", 40000, [40000 // 257] * 3),
    ],
)
def test_a_plain_picture_of_any_mode_has_its_colour(mode, colour, expected):
    image = Image.new(mode, (5, 7), colour)
    found = decode(image, "x", 8, 3)
    assert found.shape == (3, 8, 8)
    assert (found == found[:, :1, :1]).all()
    assert np.abs(found[:, 0, 0].astype(int) - expected).max() <= 1
    grey = np.dot(found[:, 0, 0], (0.299, 0.587, 0.114))
    assert abs(int(decode(image, "x", 8, 1)[0, 0, 0]) - grey) <= 1
    assert image.mode == mode


@pytest.mark.parametrize("value", [0, 1234, 40000, 65535])
def test_transparent_grey_of_16_bits_is_white(value):
    values = np.full((4, 4), 33000, np.uint16)
    values[1, 2] = value
    content = png(values, 0, [value])
    assert content.count(b"tRNS") == 1
    expected = values // 257
    expected[1, 2] = 255
    assert np.array_equal(decode(content, "x", 4, 1)[0], expected)
    assert np.array_equal(decode(encoded(Image.fromarray(values)), "x", 4, 1)[0], values // 257)


def test_transparent_colour_of_16_bits_is_white_and_no_other_is():
    """Pillow keeps the upper 8 bits of pixels, and all 16 of the transparent colour."""
    values = np.full((4, 4, 3), 0x8001, np.uint16)
    values[1, 2] = (0x1234, 0x5678, 0x9ABC)
    values[3, 3] = (0x3400, 0x7800, 0xBC00)  # the lower 8 bits of the one before
    expected = values >> 8
    expected[1, 2] = 255
    found = decode(png(values, 2, [0x1234, 0x5678, 0x9ABC]), "x", 4, 3).transpose(1, 2, 0)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(("colour_type", "bands"), [(4, 2), (6, 4)])
@pytest.mark.parametrize("alpha", [0, 0x4000, 0xFFFF])
def test_alpha_of_16_bits_is_laid_over_white(colour_type, bands, alpha):
    values = np.full((3, 5, bands), 0xA000, np.uint16)
    values[..., -1] = alpha
    found = decode(png(values, colour_type), "x", Frame(3, 5), 3)
    assert np.abs(found.astype(int) - over_white([0xA0], alpha >> 8)[0]).max() <= 1


def test_transparent_entries_of_a_palette_are_white_and_others_their_colour():
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    content = encoded(image, transparency=bytes([255, 0, 128]))
    found = decode(content, "x", 2, 3).transpose(1, 2, 0)
    wanted = [[[10, 20, 30], [255] * 3], [over_white([70, 80, 90], 128), [255] * 3]]
    assert np.abs(found.astype(int) - wanted).max() <= 1
    animated = encoded(image, "GIF", transparency=1, save_all=True, append_images=[image] * 2)
    assert decode(animated, "x", 2, 3)[:, 1, 1].tolist() == [255] * 3


def test_only_colours_in_use_make_a_palette_coloured():
    image = Image.fromarray(np.zeros((2, 2), np.uint8), "P")
    image.putpalette([10, 10, 10, 200, 0, 0])
    assert header(encoded(image), "x") == (2, 2, True)
    image.putpixel((0, 0), 1)
    assert header(encoded(image), "x") == (2, 2, False)


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1, -(2**31)])
def test_values_of_32_bits_are_refused_where_they_are_no_16(value):
    image = Image.new("I", (3, 3), value)
    for read in (lambda: decode(image, "x", 4, 1), lambda: peak_of(image, "x")):
        with pytest.raises(DataError, match="x: 32-bit values outside 0 to 65535"):
            read()


@pytest.mark.parametrize("resize", ["crop", "letterbox", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (7, 5), (8, 8), (1000, 3)])
@pytest.mark.parametrize("frame", [(8, 8), (1, 1), (3, 50)])
def test_a_plain_picture_of_any_shape_stays_plain(resize, size, frame):
    found = decode(Image.new("RGB", size, (200, 100, 50)), "x", Frame(*frame, resize), 3)
    assert found.shape == (3, *frame)
    assert found.flags.c_contiguous
    pixels = {tuple(pixel) for pixel in found.reshape(3, -1).T.tolist()}
    assert (200, 100, 50) in pixels
    assert pixels <= {(200, 100, 50), (0, 0, 0)} if resize == "letterbox" else len(pixels) == 1


def test_letterboxes_and_crops_are_centred():
    wide = np.tile(np.arange(16, dtype=np.uint8), (8, 1))
    assert np.array_equal(decode(Image.fromarray(wide), "x", 8, 1)[0], wide[:, 4:12])
    found = decode(Image.fromarray(wide), "x", Frame(12, 16, "letterbox"), 1)[0]
    assert np.array_equal(found, np.pad(wide, ((2, 2), (0, 0))))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I", "I;16"])
def test_a_picture_without_pixels_is_damaged(size, mode):
    with pytest.raises(DataError, match="x: the image is damaged"):
        decode(Image.new(mode, size), "x", 4, 3)


def test_pixels_in_memory_are_brought_to_other_sizes_and_channels_as_pictures_are():
    colour = COLOURS.transpose(2, 0, 1)
    assert np.array_equal(refit(colour, Frame(6, 4), 3), colour)
    grey = refit(colour, Frame(6, 4), 1)
    assert np.array_equal(grey[0], np.asarray(Image.fromarray(COLOURS).convert("L")))
    assert np.array_equal(refit(grey, Frame(6, 4), 3), np.repeat(grey, 3, axis=0))
    for frame in (Frame(4, 4), Frame(4, 4, "squash"), Frame(9, 3, "letterbox")):
        wanted = decode(Image.fromarray(COLOURS), "x", frame, 3)
        assert np.array_equal(refit(colour, frame, 3), wanted)


WRITTEN = sorted({*READ} & {*Image.SAVE} | {"PPM"})
NOISE = Image.fromarray(RANDOM.integers(0, 256, (12, 16, 3), np.uint8))


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of TIFF's tags
@pytest.mark.parametrize("format", WRITTEN)
def test_damage_of_a_file_of_any_format_is_a_reason_or_a_picture(format):
    """Cut anywhere, and with any of the bits that headers and tables are made of turned."""
    content = encoded(NOISE, format, **({"sizes": [(16, 12)]} if format == "ICO" else {}))
    assert decode(content, "x", Frame(12, 16), 3).shape == (3, 12, 16)
    for length in {*range(0, len(content), max(1, len(content) // 25)), len(content) - 1}:
        with suppress(DataError):  # and no other error
            assert decode(content[:length], "x", 8, 3).shape == (3, 8, 8)
    places = [*range(min(96, len(content))), *range(len(content) - 24, len(content))]
    for place in places:
        altered = bytearray(content)
        altered[place] ^= (1, 128, 255)[place % 3]
        with suppress(DataError):
            assert decode(bytes(altered), "x", 8, 3).shape == (3, 8, 8)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "QOI"])
def test_half_of_a_picture_is_damaged(format):
    content = encoded(NOISE, format)
    with suppress(DataError):
        assert peak_of(content[: len(content) // 2], "x") == -1  # of 8 bits by its header
    with pytest.raises(DataError, match=r"^a\.x: (the image is damaged|not an image|can't be)"):
        decode(content[: len(content) // 2], "a.x", 8, 3)


def test_what_is_no_file_or_too_long_is_named(tmp_path):
    with pytest.raises(DataError, match=r"x: can't be read \(not a regular file\)"):
        decode(tmp_path, "x", 8, 3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"x: can't be read \(not a regular file\)"):
        decode(tmp_path / "pipe", "x", 8, 3)
    (tmp_path / "long").touch()
    os.truncate(tmp_path / "long", MOST_BYTES + 1)
    with pytest.raises(DataError, match=r"x: can't be read \(longer than 268,435,456 bytes\)"):
        decode(tmp_path / "long", "x", 8, 3)
    with pytest.raises(DataError, match=r"x: can't be read \(File name too long\)"):
        decode(tmp_path / ("a" * 5000), "x", 8, 3)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "much", "9" * 13, "9" * 5000, " 3", "1e3"])
def test_a_limit_that_is_no_number_is_named_and_shortened(monkeypatch, value):
    monkeypatch.setenv(IMAGE_MIB, value)
    with pytest.raises(UsageError, match=f"{IMAGE_MIB} must be an integer.*unset it") as caught:
        decode(Image.new("L", (2, 2)), "x", 8, 1)
    assert len(str(caught.value)) < 250


def test_a_limit_counts_four_bytes_a_pixel(monkeypatch):
    assert most_pixels() == MOST_PIXELS
    monkeypatch.setenv(IMAGE_MIB, "")
    assert most_pixels() == MOST_PIXELS
    monkeypatch.setenv(IMAGE_MIB, "1")
    assert most_pixels() == 2**18
    assert decode(Image.new("L", (512, 512)), "x", 2, 1).shape == (1, 2, 2)
    with pytest.raises(DataError, match=r"x: 262,656 pixels are too many .* at most 262,144"):
        decode(Image.new("L", (512, 513)), "x", 2, 1)


@pytest.mark.parametrize(
    ("value", "is_one"),
    [(None, 1), (1, 1), (16, 1), (0, 0), (17, 0), (True, 0), (8.0, 0), ("8", 0), ([], 0)],
)
def test_bit_depths_are_whole_numbers_up_to_16(value, is_one):
    assert is_bit_depth(value) == bool(is_one)
