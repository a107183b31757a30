"""Folders of random images, and tables of them."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def write_images(folder: Path, count: int, size=(8, 8), mode="RGB", seed=0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03}.png")


def write_parquet(folder: Path, split: str, images, labels, names=None, **columns) -> None:
    label = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    features = datasets.Features({"picture": datasets.Image(), "label": label})
    for column in columns:
        features[column] = datasets.ClassLabel(names=["x", "y"])
    table = datasets.Dataset.from_dict(
        {"picture": images, "label": labels, **columns}, features=features
    )
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def grey(count, size=8):
    generator = np.random.default_rng(1)
    return [
        Image.fromarray(generator.integers(0, 256, (size, size), dtype=np.uint8))
        for _ in range(count)
    ]
