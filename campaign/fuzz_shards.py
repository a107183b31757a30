"""Fuzzed folders of shards: valid, partly empty, damaged or malicious.

Every image is of one colour, which is its number, and its label is the number modulo 3. So whatever
is read, it is seen whether an image came with the label of another.
"""

import io
import os
import shutil
import tarfile
import tempfile
import warnings
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from campaign.trials import RIGHT, TOLD, Part, Verdict, generator
from smallfry.data import ImageData, load_data
from smallfry.errors import SmallfryError

TABLE = pa.schema([("image", pa.struct([("bytes", pa.binary())])), ("label", pa.int64())])
NAMES = ("../x.png", "/x.png", "", ".", "a/b/../c.png", "x" * 3000 + ".png", "\u202e.png", "\n.png")
KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
LENGTHS = (-1, -5, -512, -(2**40), 2**33, 2**62, 2**80)
WHOLE = ("whole", "strange members")  # which must be read in full
TIGHT = "packed tightly"
VALUES, MIB = (1, 5, 10), 2**20  # in a dictionary of 64 MiB each


def prepare(folder: Path) -> Path:
    """Create a folder for the shards, with dictionaries that unpack to much more than stored."""
    for count in VALUES:
        file = folder / f"{count}.tight"
        if not file.exists():
            values = pa.array([bytes(64 * MIB) + bytes([i]) for i in range(count)])
            cells = pa.DictionaryArray.from_arrays(pa.array(range(count), pa.int32()), values)
            image = pa.StructArray.from_arrays([cells], ["bytes"])
            table = pa.table({"image": image, "label": [i % 3 for i in range(count)]})
            pq.write_table(table, file, compression="zstd", dictionary_pagesize_limit=2**30)
    return folder


def trial(folder: Path, number: int) -> Verdict:
    """Read a folder of shards in one of several ways."""
    random = generator("shards", number)
    form = random.choice(("parquet", "tar"))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        counts = [random.choice((0, 0, 1, 2, 5)) for _ in range(random.randrange(1, 5))] + [6]
        random.shuffle(counts)
        kind, first = "whole", 0
        for shard, count in enumerate(counts):
            file = Path(place, f"train-{shard:05}.{form}")
            (_parquet if form == "parquet" else _tar)(file, range(first, first + count), random)
            first += count
        if form == "parquet" and number % 25 == 0:
            kind = TIGHT
            other = Path(place, f"train-{len(counts):05}.parquet")
            shutil.copy(folder / f"{random.choice(VALUES)}.tight", other)
        elif random.random() < 0.8:
            kind = _harm(random.choice(sorted(Path(place).iterdir())), form, random)
        skip, stream = random.random() < 0.5, random.random() < 0.7
        read = set(range(first))
        os.environ["SMALLFRY_CACHE"] = f"{place}/cache"
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                data = load_data(
                    *(place,),
                    **{"stream": stream, "skip_unreadable": skip, "image_size": 8, "channels": 1},
                    **{"test": 0.0, "validation": 0.0, "min_classes": 1},
                )
                failure = _judge(data, read, kind, bool(warned))
        except SmallfryError as error:
            failure = f"{form}: a whole one is refused: {error}" if kind in WHOLE else None
            return Verdict(f"{form}, {kind}", TOLD, failure and failure[:300])
        return Verdict(f"{form}, {kind}", RIGHT, failure)


def _judge(data: ImageData, written: set[int], kind: str, warned: bool) -> str | None:
    images = data.train.images[:, 0].flatten(1)
    numbers = images[:, 0].tolist()
    if (images != images[:, :1]).any() or len(set(numbers)) < len(numbers):
        return None if kind == "bytes changed" else "an image is another one, or comes twice"
    told = [data.classes[label] for label in data.train.labels.tolist()]
    if told != [str(n % 3) for n in numbers] and kind != "bytes changed":
        return f"images with wrong labels: {numbers} {told}"
    if set(numbers) != written and (kind in WHOLE or not warned):
        return f"images were lost silently: {sorted(written - set(numbers))}"
    return None


def _picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), number, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _parquet(file: Path, rows: range, random: Random) -> None:
    left = list(rows)
    with pq.ParquetWriter(file, TABLE, compression=random.choice(("none", "snappy"))) as writer:
        while left or random.random() < 0.3:
            group = [left.pop(0) for _ in range(min(len(left), random.choice((0, 1, 2, 4))))]
            cells = [{"bytes": _picture(i)} for i in group]
            table = pa.table({"image": cells, "label": [i % 3 for i in group]}, TABLE)
            writer.write_table(table)


def _tar(file: Path, rows: range, random: Random) -> None:
    format = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(file, "w", format=format) as archive:
        for i in rows:
            _add(archive, f"{i:05}.png", _picture(i))
            _add(archive, f"{i:05}.cls", str(i % 3).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _harm(file: Path, form: str, random: Random) -> str:
    """Damage a shard, and describe the damage."""
    content = file.read_bytes()
    way = random.choice(("truncated", "bytes changed", *("joined", "a length", "strange") * 2))
    if way == "truncated":
        os.truncate(file, random.randrange(len(content)))
    elif way == "joined":
        gap = bytes(random.choice((0, 512, 10240, 2**21)))
        file.write_bytes(content + gap + content)
        return "joined" if len(content.strip(b"\0")) else "whole"  # there is nothing in it
    elif way == "bytes changed" or form == "parquet":
        changed = bytearray(content)
        for _ in range(random.choice((1, 2, 20))):
            changed[random.randrange(len(changed))] = random.randrange(256)
        file.write_bytes(changed)
        return "bytes changed"
    elif way == "a length":
        head = bytearray(tarfile.TarInfo(f"x.{random.choice(('png', 'cls', 'txt'))}").tobuf())
        head[124:136] = (random.choice(LENGTHS) % 2**95 | 2**95).to_bytes(12, "big")
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        end = len(content.rstrip(b"\0")) // 512 * 512 + 512 if content.strip(b"\0") else 0
        file.write_bytes(content[:end] + head[:512] + content[end:])
    else:
        with tarfile.open(file, "a") as archive:
            for _ in range(random.choice((1, 5))):
                if random.random() < 0.5:
                    member = tarfile.TarInfo(random.choice(("a.png", "a.cls", *NAMES)))
                    member.type = random.choice(KINDS)
                    member.linkname = random.choice(("/etc/passwd", "00000.png", "../x"))
                    archive.addfile(member)
                else:
                    _add(archive, random.choice(NAMES[:2]), b"x")
        return "strange members"
    return way


PART = Part(
    "shards",
    "each image with its own label, or an error; none is lost silently",
    prepare,
    trial,
    count=10_000,
    short=200,
    seconds=600,
)
