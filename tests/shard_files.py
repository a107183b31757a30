"""Folders of small shards whose images tell their number."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def picture(number: int, size: int = 8) -> bytes:
    """A grey PNG that is dark, middling or light by its class, with its number in a corner."""
    pixels = np.random.default_rng(number).integers(0, 60, (size, size), dtype=np.uint8)
    pixels += np.uint8(60 * (number % len(CLASSES)))
    pixels[0, :3] = number // 65536, number // 256 % 256, number % 256
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def numbers(images) -> list[int]:
    """The numbers of images (images, 1, size, size), uint8."""
    high, middle, low = images[:, 0, 0, :3].long().unbind(1)
    return (high * 65536 + middle * 256 + low).tolist()


def write_parquet_shards(
    folder: Path, counts, split="train", first=0, group=4, names=CLASSES, spoilt=()
) -> None:
    """Shards with so many images each, in row groups of ``group``; class: number modulo 3.

    Without names, labels are bare numbers; images with a number in ``spoilt`` are cut off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    for shard, count in enumerate(counts):
        taken = range(first, first + count)
        rows = {
            "image": [
                {"bytes": picture(i)[: 60 if i in spoilt else None], "path": None} for i in taken
            ],
            "label": [i % len(CLASSES) for i in taken],
        }
        file = folder / f"{split}-{shard:05}-of-{len(counts):05}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file, batch_size=group)
        first += count


def write_tar_shards(folder: Path, counts, split="train", first=0, label="cls", spoilt=()) -> None:
    """The same as tar files; the label is a number in .cls, or a name in .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{split}-{shard:06}.tar", "w") as archive:
            for i in range(first, first + count):
                told = str(i % 3) if label == "cls" else json.dumps({"label": CLASSES[i % 3]})
                add(archive, f"{i:06}.png", picture(i)[: 60 if i in spoilt else None])
                add(archive, f"{i:06}.{label}", told.encode())
        first += count


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


WRITERS = {"parquet": write_parquet_shards, "tar": write_tar_shards}
