import struct
import warnings
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from smallfry.errors import DataError, SmallfryWarning, UsageError
from smallfry_runtime.frames import frame_of
from smallfry_runtime.images import bit_depth_of, decode, header, peak_of, refit


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def ramp(dtype, top, size=8):
    return np.linspace(0, top, size * size).reshape(size, size).astype(dtype)


def test_rgb_pixels_come_out_channels_first_and_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(
        decode(encoded(Image.fromarray(pixels)), "x", 8, 3), pixels.transpose(2, 0, 1)
    )


def test_grey_becomes_three_equal_channels_and_back():
    pixels = ramp(np.uint8, 255)
    rgb = decode(encoded(Image.fromarray(pixels)), "x", 8, 3)
    assert (rgb == pixels).all()
    assert np.array_equal(refit(rgb, 8, 1)[0], pixels)


def test_sixteen_bits_are_scaled_not_clipped():
    values = ramp(np.uint16, 65535)
    found = decode(encoded(Image.fromarray(values)), "x", 8, 1)[0]
    assert np.abs(found.astype(int) - values / 257).max() <= 1
    assert found.max() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    assert (decode(encoded(image, **options), "x", 8, 3) == 255).all()


def test_a_palette_image_keeps_its_colours():
    image = Image.new("RGB", (8, 8), (200, 10, 30)).quantize(4)
    assert decode(encoded(image), "x", 8, 3)[:, 0, 0] == pytest.approx([200, 10, 30], abs=2)


@pytest.mark.parametrize("format", ["JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_other_formats_are_read(format):
    image = Image.new("RGB", (8, 8), (250, 250, 250))
    assert decode(encoded(image, format), "x", 8, 3).min() >= 245


def test_cmyk_is_converted():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    red, green, blue = decode(encoded(image, "JPEG"), "x", 8, 3)[:, 4, 4].tolist()
    assert red > 200
    assert green < 60
    assert blue < 60


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    turned = decode(encoded(image, "PNG", exif=exif), "x", 8, 1)[0]
    assert turned[:, 4:].min() == 255
    assert turned[:, :4].max() == 0


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, "x", 8, 1)[0, 0, 0] == pytest.approx(40, abs=2)


def test_oblong_images_are_cropped_at_their_centre():
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 255
    assert (decode(encoded(Image.fromarray(pixels)), "x", 8, 1) == 255).all()


@pytest.mark.parametrize(("size", "shape"), [(4, (4, 4)), ((4, 6), (4, 6)), ([6, 4], (6, 4))])
def test_sizes_are_a_side_or_height_and_width(size, shape):
    assert decode(encoded(Image.new("L", (9, 5))), "x", size, 1).shape == (1, *shape)


def test_letterboxes_keep_everything_between_black_borders():
    image = Image.new("L", (8, 2), 200)
    pixels = decode(encoded(image), "x", frame_of((6, 4), "letterbox"), 1)[0]
    assert (pixels[2] == 200).all()  # 8 × 2 becomes 4 × 1
    assert (pixels == 200).sum() == 4
    assert pixels.sum() == 4 * 200
    upright = decode(encoded(image.rotate(90, expand=True)), "x", frame_of((8, 8), "letterbox"), 1)
    assert (upright[0] == 200).all(axis=0).tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_a_thread_of_pixels_stays_in_its_letterbox():
    pixels = decode(encoded(Image.new("L", (1, 500), 9)), "x", frame_of((8, 6), "letterbox"), 1)
    assert (pixels[0] == 9).sum() == 8


def test_squashed_images_are_stretched_whole():
    pixels = np.repeat(np.array([[10], [20], [30], [40]], np.uint8), 2, axis=1)
    found = decode(encoded(Image.fromarray(pixels)), "x", frame_of((4, 4), "squash"), 1)
    assert found[0].tolist() == [[10] * 4, [20] * 4, [30] * 4, [40] * 4]


@pytest.mark.parametrize(
    ("size", "resize", "message"),
    [
        (0, None, "at least 1, got 0"),
        ((8, -1), None, "at least 1, got 8×-1"),
        ((8, 8, 8), None, "height and width such as 96 64"),
        ((), None, "height and width such as 96 64"),
        (8.0, None, "height and width such as 96 64"),
        ((8, True), None, "height and width such as 96 64"),
        ("8", None, "height and width such as 96 64"),
        ((4097, 8), None, "at most 4096, got 4097×8"),
        (8, "stretch", "crop, letterbox, squash, not 'stretch'"),
    ],
)
def test_frames_that_can_not_be_are_refused(size, resize, message):
    with pytest.raises(UsageError, match=message):
        frame_of(size, resize)


def test_the_header_tells_size_and_greyness():
    assert header(encoded(Image.new("L", (5, 7))), "x") == (5, 7, True)
    assert header(encoded(Image.new("RGB", (5, 7))), "x") == (5, 7, False)
    assert header(encoded(Image.fromarray(ramp(np.uint16, 9))), "x") == (8, 8, True)
    grey_palette = Image.fromarray(ramp(np.uint8, 255)).convert("P")
    assert header(encoded(grey_palette, "GIF"), "x") == (8, 8, True)
    assert header(encoded(Image.new("RGB", (8, 8), (9, 0, 0)).quantize(4)), "x") == (8, 8, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image"),
        (b"this is a text file", "not an image"),
        (encoded(Image.fromarray(ramp(np.uint8, 255)))[:60], "damaged|can't be read|not an image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "damaged"),
    ],
)
def test_what_is_no_image_is_named(content, message):
    with pytest.raises(DataError, match=f"cat.png: .*({message})"):
        decode(content, "cat.png", 8, 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: can't be read"):
        decode(tmp_path / "gone.png", "gone.png", 8, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])  # TIFF and ICO ask Pillow once more
def test_sizes_are_judged_by_the_own_bound_and_pillow_warns_of_none(monkeypatch, format):
    content = encoded(
        Image.new("L", (512, 512)), format, **({"sizes": [(256, 256)]} if format == "ICO" else {})
    )
    for limit in (200_000, 10):  # of which Pillow warns, and which it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode(content, "x", 8, 1).shape == (1, 8, 8)
    monkeypatch.setattr("smallfry_runtime.images.most_pixels", lambda: 65_535)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="x: 262,144 pixels are too many"):
            decode(content, "x", 8, 1)


@pytest.mark.parametrize("bits", [1, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_wide_pixels_are_scaled_by_the_bit_depth_alone(bits, dtype):
    most = 2**bits - 1
    values = ramp(dtype, most)
    found = decode(encoded(Image.fromarray(values), "TIFF"), "x", 8, 1, bits)[0]
    assert np.array_equal(found, values.astype(np.int64) * 255 // most)
    darker = encoded(Image.fromarray(values // 2), "TIFF")  # not by each picture's own maximum
    assert np.array_equal(
        decode(darker, "x", 8, 1, bits)[0], values.astype(np.int64) // 2 * 255 // most
    )


def test_a_value_beyond_the_bit_depth_is_refused_and_not_clipped():
    image = encoded(Image.fromarray(ramp(np.uint16, 4096)))
    with pytest.raises(DataError, match=r"x: holds the value 4,096, and 4,095 .* of 12 bits"):
        decode(image, "x", 8, 1, 12)
    assert decode(image, "x", 8, 1, 14).max() == 4096 * 255 // 16383


def test_values_of_255_and_256_differ_little_whatever_the_bit_depth():
    for bits in (12, 16):
        dark = [
            decode(encoded(Image.fromarray(ramp(np.uint16, top))), "x", 8, 1, bits)[0, -1, -1]
            for top in (255, 256)
        ]
        assert int(dark[1]) - int(dark[0]) in (0, 1)


def test_an_unknown_bit_depth_is_told_where_a_picture_does_not_show_it():
    with pytest.warns(SmallfryWarning, match="assumed to span 0 to 65,535"):
        found = decode(encoded(Image.fromarray(ramp(np.uint16, 4095))), "x", 8, 1)
    assert found.max() == 4095 // 257
    decode(encoded(Image.fromarray(ramp(np.uint16, 40_000))), "x", 8, 1)  # a warning is a failure


def wide_colour(top: int) -> bytes:
    """A TIFF of 16-bit RGB, which Pillow reads and does not write."""
    pixels = np.linspace(0, top, 8 * 8 * 3).astype("<u2").tobytes()
    tags = [(256, 8), (257, 8), (258, 16), (259, 1), (262, 2), (273, 8), (277, 3), (278, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    entries = entries.replace(struct.pack("<HHII", 258, 3, 1, 16), b"")
    where = 8 + len(pixels)
    bits = struct.pack("<HHII", 258, 3, 3, where)
    first, rest = entries[:24], entries[24:]
    body = pixels + struct.pack("<3H", 16, 16, 16) + struct.pack("<H", 9)
    size = struct.pack("<HHII", 279, 4, 1, len(pixels))
    return b"II*\0" + struct.pack("<I", where + 6) + body + first + bits + rest + size + bytes(4)


def test_colour_of_16_bits_is_read_by_its_upper_half_and_no_smaller_depth_is_pretended():
    full = wide_colour(65535)
    assert peak_of(full, "x") == 65535
    assert decode(full, "x", 8, 3).max() == 255
    dark = wide_colour(4095)
    assert peak_of(dark, "x") == 15 * 257
    with pytest.warns(SmallfryWarning, match="assumed to span 0 to 65,535"):
        decode(dark, "x", 8, 3)
    with pytest.raises(DataError, match=r"x: 16-bit colour .* bit depth of 12"):
        decode(dark, "x", 8, 3, 12)


def test_the_peak_is_that_of_wide_images_only():
    assert peak_of(encoded(Image.fromarray(ramp(np.uint8, 200))), "x") == -1
    assert peak_of(encoded(Image.fromarray(ramp(np.uint16, 200))), "x") == 200
    assert [bit_depth_of(peak) for peak in (0, 255, 256, 1024, 4095, 4096, 65535)] == [
        *(8, 8, 10, 12, 12, 14, 16)
    ]
    with pytest.raises(DataError, match="x: not an image"):
        peak_of(b"none", "x")


def test_damage_of_any_kind_is_told_by_header_and_decoder_alike():
    palette = encoded(Image.effect_noise((64, 64), 50).convert("P"))
    with pytest.raises(DataError, match="x: "):
        header(palette[:900], "x")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG", exif=exif))
    for place in range(photo.index(b"Exif"), photo.index(b"Exif") + 40):
        broken = bytearray(photo)
        broken[place] ^= 0xFF
        with suppress(DataError):  # and no other
            decode(bytes(broken), "x", 8, 3)


def test_floating_point_pixels_are_refused_with_what_to_do():
    image = Image.fromarray(ramp(np.float32, 1.0))
    with pytest.raises(DataError, match="8 or 16 bits"):
        decode(encoded(image, "TIFF"), "x", 8, 1)


def test_an_image_of_100_megapixels_is_refused_before_its_pixels_are_read() -> None:
    stream = BytesIO()
    Image.new("1", (10_000, 10_000)).save(stream, "PNG")
    for read in (lambda b: decode(b, "big.png", 32, 3), lambda b: header(b, "big.png")):
        with pytest.raises(DataError, match="100,000,000 pixels are too many"):
            read(stream.getvalue())
