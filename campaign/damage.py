"""Damage to one file of a run, an export or a shared folder, which must be detected."""

import os
import struct
import tempfile
from pathlib import Path
from random import Random

from campaign.artifacts import (
    TARGETS,
    Artifacts,
    Target,
    copy,
    equal,
    key,
    prepare,
    whole,
)
from campaign.trials import RIGHT, TOLD, Part, Verdict, generator
from smallfry.errors import SmallfryError

HUGE = 100 * 2**30  # bytes of a sparse file
WAYS = (
    *("bits flipped",) * 8,
    *("bytes overwritten", "bytes inserted", "bytes lost", "bytes appended"),
    *("truncated",) * 4,
    *("empty", "missing", "a folder", "a pipe", "a loop of links", "a sparse file of 100 GiB"),
    *("all zeros", "another file's content"),
)


def trial(artifacts: Artifacts, number: int) -> Verdict:
    """Damage one file in one way, and read the folder."""
    random = generator("damage", number)
    target = TARGETS[number % len(TARGETS)]
    way = WAYS[number // len(TARGETS) % len(WAYS)]
    wanted = whole(artifacts, target)
    with tempfile.TemporaryDirectory(dir=artifacts.scratch) as place:
        folder = copy(artifacts, target, Path(place))
        where = harm(folder / target.file, way, random, artifacts)
        what = f"{key(target)}: {where}"
        try:
            found = target.read(folder)
        except SmallfryError as error:
            return Verdict(what, TOLD, _unclear(str(error), target, folder))
    if target.editable:
        return Verdict(what, "read as it stands")
    return Verdict(what, RIGHT, None if equal(wanted, found) else "read silently as something else")


def _unclear(message: str, target: Target, folder: Path) -> str | None:
    name = Path(target.file).name
    if name not in message and str(folder) not in message:
        return f"the message does not name the file: {message}"[:300]
    if target.offers and target.offers not in message:
        return f"the message does not offer {target.offers}: {message}"[:300]
    return None


def harm(file: Path, way: str, random: Random, artifacts: Artifacts) -> str:
    """Damage a file, and describe the damage."""
    content = bytearray(file.read_bytes())
    if way in ("bits flipped", "bytes overwritten"):
        place, at = _somewhere(file, content, random)
        if way == "bits flipped":
            content[at] ^= 1 << random.randrange(8)
        else:
            content[at : at + 4] = random.randbytes(4)
        file.write_bytes(content)
        return f"{way}, {place}"
    if way in ("bytes inserted", "bytes lost", "bytes appended"):
        at = len(content) if way == "bytes appended" else random.randrange(len(content))
        many = random.choice((1, 8, 4096))
        if way == "bytes lost":
            del content[at : at + many]
        else:
            content[at:at] = random.randbytes(many)
        file.write_bytes(content)
    elif way == "truncated":
        half = len(content) // 2
        os.truncate(file, random.choice((1, 7, 8, 9, 100, half, len(content) - 1)) % len(content))
    elif way == "empty":
        file.write_bytes(b"")
    elif way == "all zeros":
        file.write_bytes(bytes(len(content)))
    elif way == "another file's content":
        other = random.choice([t for t in TARGETS if Path(t.file).name != file.name])
        file.write_bytes((artifacts.folder / other.place / other.file).read_bytes())
    else:
        file.unlink()
        if way == "a folder":
            file.mkdir()
        elif way == "a pipe":
            os.mkfifo(file)
        elif way == "a loop of links":
            file.symlink_to(file)
        elif way == "a sparse file of 100 GiB":
            file.touch()
            os.truncate(file, HUGE)
    return way


def _somewhere(file: Path, content: bytearray, random: Random) -> tuple[str, int]:
    """Choose a position in the file, with each kind equally likely."""
    places: dict[str, list[int] | range] = {"anywhere": range(len(content))}
    if file.suffix == ".safetensors":
        head = 8 + struct.unpack("<Q", content[:8])[0]
        places = {
            "length of the header": range(8),
            "header": range(8, head),
            "weights": range(head, len(content)),
        }
    elif file.suffix == ".json":
        text = content.decode("latin1")
        keys = [i for i, c in enumerate(text) if text[i + 1 : i + 3] == '":']
        marks = [i for i, c in enumerate(text) if c in '{}[]:,"']
        values = [i for i, c in enumerate(text) if c.isalnum() and i not in set(keys)]
        places = {"a key": keys, "a value": values, "punctuation": marks}
    elif file.suffix == ".pt":
        starts = [content.find(mark) for mark in (b"PK\3\4", b"PK\1\2", b"PK\5\6")]
        names = ("header in the zip", "directory of the zip", "end of the zip")
        places = {
            n: range(s, min(s + 22, len(content))) for n, s in zip(names, starts, strict=True)
        }
        places["optimizer state"] = range(starts[0] + 100, starts[1])
    name = random.choice([name for name, found in places.items() if len(found)])
    return name, random.choice(places[name])


PART = Part(
    "damage",
    "never loaded silently: the error names the file, and the previous checkpoint if there is one",
    prepare,
    trial,
    count=10_000,
    short=len(TARGETS) * len(WAYS),
    seconds=600,
)
