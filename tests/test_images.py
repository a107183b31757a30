from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from smallfry.errors import DataError
from smallfry.images import decode, header, refit


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


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"x: too large"):
        decode(encoded(Image.new("L", (64, 64))), "x", 8, 1)


def test_small_values_in_wide_pixels_are_not_lost():
    image = Image.fromarray(ramp(np.int32, 255))
    assert decode(encoded(image, "TIFF"), "x", 8, 1).max() == 255


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
        with pytest.raises(DataError, match="10000 × 10000 pixels are too many"):
            read(stream.getvalue())
