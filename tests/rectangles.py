"""Photographs of several shapes in two classes, told apart by the brighter half."""

from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ((30, 20), (20, 30), (24, 24), (50, 11))  # width and height


def write_photographs(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Write a folder per class of grey images."""
    random = np.random.default_rng(seed)
    for label, name in enumerate(("left", "right")):
        place = folder / name
        place.mkdir(parents=True)
        for number in range(count):
            width, height = SHAPES[number % len(SHAPES)]
            pixels = random.integers(0, 60, (height, width), np.uint8)
            pixels[:, label * width // 2 : (label + 1) * width // 2] += 150
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder
