"""Small files that decode to much: refused by their headers, in little memory."""

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smallfry.errors import DataError, UsageError
from smallfry_runtime.decoding import (
    MOST_PIXELS,
    Budget,
    most_pixels,
    pixels_in_icon,
    pixels_in_tile,
)
from smallfry_runtime.images import decode, header

MIB = 2**20


def deflated(count: int) -> bytes:
    """So many zeros, packed without ever being in memory."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(MIB)) for _ in range(count // MIB)]
    return b"".join([*parts, packer.compress(bytes(count % MIB)), packer.flush()])


def tiff(tags: list[tuple[int, int, int, int]], body: bytes) -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    start = struct.pack("<4sI", b"II*\0", 8 + len(body))
    return start + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiled(side: int, tile: int, bits: int) -> bytes:
    """A TIFF of side × side pixels in one deflated tile."""
    data = deflated(tile * tile * bits // 8)
    geometry = [(256, 4, 1, side), (257, 4, 1, side), (322, 4, 1, tile), (323, 4, 1, tile)]
    kind = [(258, 3, 1, bits), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff([*geometry, *kind, (324, 4, 1, 8), (325, 4, 1, len(data))], data)


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 0) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def icon(inner: bytes) -> bytes:
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return b"\0\0\1\0" + struct.pack("<H", 1) + entry + inner


BOMBS = {  # for a bound of 16 MiB; the campaign has some a hundred times as large
    "a tile of 72 MB around 16 pixels": lambda: tiled(16, 6000, 16),
    "16 megapixels of RGBA": lambda: png(4000, 4000, deflated(4000 * 16_001), colour=6),
    "an icon of 16 megapixels": lambda: icon(png(4000, 4000, deflated(4000 * 16_001), colour=6)),
}

MEASURE = """
import sys
from pathlib import Path
from smallfry_runtime.images import decode, header, peak_of
from smallfry.errors import DataError
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak()
file = Path(sys.argv[1])
for content in (file, file.read_bytes()):
    for read in (header, peak_of, lambda e, where: decode(e, where, 8, 3, 16)):
        try:
            read(content, "x")
            print("read")
        except DataError as error:
            print("refused" if "too " in str(error) else error)
print(peak() - before)
"""


def measured(file: Path, **environment: str) -> tuple[set[str], float]:
    """What came of reading a file in all ways, and by how many MiB memory grew meanwhile."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    *said, grown = done.stdout.splitlines()
    return set(said), int(grown) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_what_decodes_to_more_than_the_bound_is_refused_in_little_memory(name, tmp_path):
    file = tmp_path / "bomb"
    file.write_bytes(BOMBS[name]())
    assert file.stat().st_size < MIB
    said, grown = measured(file, SMALLFRY_IMAGE_MIB="16")
    assert said == {"refused"}
    assert grown < 16
    assert measured(file)[1] > 60  # allowed, they do take it


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "RGB"])
def test_an_image_that_is_read_takes_little_more_than_twice_its_decoded_size(mode, tmp_path):
    side = 3000  # 34 MiB at four bytes a pixel
    image = Image.new("RGBA" if mode == "RGBA" else "RGB", (side, side), (1, 2, 3))
    if mode == "P":
        image = image.quantize(2)
    if mode == "I;16":
        image = Image.fromarray(np.full((side, side), 40_000, np.uint16))
    options = {"transparency": 0} if mode == "P" else {}
    image.save(tmp_path / "x.png", compress_level=1, **options)
    said, grown = measured(tmp_path / "x.png")
    assert said == {"read"}
    assert grown < 34 * 2.7 + 16


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_the_bound_can_be_set(tmp_path):
    Image.new("L", (1000, 1000)).save(tmp_path / "x.png")
    assert measured(tmp_path / "x.png", SMALLFRY_IMAGE_MIB="3")[0] == {"refused"}
    assert measured(tmp_path / "x.png", SMALLFRY_IMAGE_MIB="4")[0] == {"read"}


def test_the_bound_is_a_whole_number_of_mebibytes(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MOST_PIXELS)
    assert most_pixels() == MOST_PIXELS
    monkeypatch.setenv("SMALLFRY_IMAGE_MIB", "64")
    assert most_pixels() == 2**24
    assert Image.MAX_IMAGE_PIXELS == MOST_PIXELS
    monkeypatch.setenv("SMALLFRY_IMAGE_MIB", "4096")
    assert most_pixels() == Image.MAX_IMAGE_PIXELS == 2**30
    for wrong in ("0", "-1", "1.5", "many", "1e9"):
        monkeypatch.setenv("SMALLFRY_IMAGE_MIB", wrong)
        with pytest.raises(UsageError, match=f"must be an integer, .* in MiB, not '{wrong}'"):
            decode(b"", "x", 8, 1)


def test_tiles_and_icons_are_measured_by_headers_of_their_own():
    with Image.open(io.BytesIO(tiled(16, 64, 16))) as image:
        assert pixels_in_tile(image) == 64 * 64 * 2 / 4
    assert decode(tiled(16, 64, 8), "x", 8, 1).max() == 0
    assert pixels_in_tile(Image.new("L", (9, 9))) == 0
    stream = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(stream, "ICO", sizes=[(64, 64), (16, 16)])
    assert pixels_in_icon(stream) == 0  # it is read from where it stands
    stream.seek(0)
    assert pixels_in_icon(stream) == 64 * 64
    assert stream.tell() == 0
    Image.new("RGBA", (48, 48)).save(bitmap := io.BytesIO(), "ICO", bitmap_format="bmp")
    bitmap.seek(0)
    assert pixels_in_icon(bitmap) == 2 * 48 * 48  # the picture and its mask
    for cut in (0, 3, 6, 20, 30):
        assert pixels_in_icon(io.BytesIO(stream.getvalue()[:cut])) == 0
    assert header(stream.getvalue(), "x")[:2] == (64, 64)


def test_a_tiff_whose_tags_are_no_numbers_is_damaged():
    content = bytearray(tiled(16, 64, 8))
    at = content.index(struct.pack("<HH", 322, 4))
    content[at + 2 : at + 4] = struct.pack("<H", 2)  # text
    with pytest.raises(DataError, match="x: "):
        decode(bytes(content), "x", 8, 1)


# Threads


def test_threads_wait_until_their_share_is_free():
    budget, most, held, lock = Budget(10), [0], [0], threading.Lock()

    def work(amount: int) -> None:
        for _ in range(50):
            with budget.taking(amount):
                with lock:
                    held[0] += min(amount, 10)
                    most[0] = max(most[0], held[0])
                with lock:
                    held[0] -= min(amount, 10)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in (1, 3, 6, 10, 99)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)
    assert 0 < most[0] <= 10


def test_what_was_held_is_free_again_after_an_error_and_after_a_fork():
    budget = Budget(10)
    with pytest.raises(ZeroDivisionError), budget.taking(10):
        _ = 1 / 0
    with budget.taking(10):
        budget.reset()
        with budget.taking(10):
            pass
