"""Pictures of two handwritten digits side by side, with the classes of both; generated."""

import csv
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "=one", "two")  # the second begins like a formula
TINY = "{embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}"
GIVEN = (  # options of a small training
    *("--task=multilabel", "--model.name=vitrm_micro_patch4_8", f"--model.options={TINY}"),
    *("--data.image_size", "8", "16", "--progress=quiet", "--batch_size=16", "--threads=1"),
)


def write_pairs(folder: Path, count: int = 60, seed: int = 0) -> list[tuple[Path, list[str]]]:
    """Write images of 8 × 16 pixels into a new folder; return them with their classes."""
    digits = load_digits(n_class=len(NAMES) + 1)  # the last has no class
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    found = []
    for number in range(count):
        chosen = random.integers(len(digits.target), size=2)
        pixels = np.hstack([digits.images[i] for i in chosen]) * 255 / 16
        file = folder / f"{number:03}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(file)
        labels = sorted({int(digits.target[i]) for i in chosen} - {len(NAMES)})
        found.append((file, [NAMES[i] for i in labels]))
    return found


def write_csv(file: Path, pairs, separator: str = "|") -> None:
    """Write a column of classes."""
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "labels"])
        writer.writerows([image.name, separator.join(names)] for image, names in pairs if names)


def write_columns(file: Path, pairs) -> None:
    """Write a column of 0 and 1 for each class."""
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", *NAMES])
        for image, names in pairs:
            writer.writerow([image.name, *(int(name in names) for name in NAMES)])


def write_lines(file: Path, pairs) -> None:
    """Write JSON lines with lists of classes."""
    rows = [json.dumps({"image": image.name, "labels": names}) for image, names in pairs]
    file.write_text("\n".join(rows) + "\n")


def write_links(folder: Path, pairs) -> None:
    """Lay every image into the folders of its classes, as symbolic links."""
    for image, names in pairs:
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            os.symlink(image, folder / name / image.name)
