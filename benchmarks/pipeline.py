"""Throughput of image augmentation, against torchvision's transforms of single PIL images.

    python benchmarks/pipeline.py --out results/pipeline.json

One core, random 32×32 RGB images, crop, flip, RandAugment (2 operations, magnitude 9), Mixup,
normalised batches. The peer is what the paper's recipe runs in each worker of its loader. Both
take turns in rounds; the ratio is the median over rounds. Exit code 1: less than wanted.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from smallfry.training.augment import Augment
from smallfry.training.config import AugmentConfig
from smallfry.training.provenance import provenance

IMAGES, BATCH, CLASSES = 2048, 128, 10
MEAN, STD = (0.5,) * 3, (0.25,) * 3
WANTED = 3.0


def batches(pixels: Tensor, labels: Tensor) -> float:
    """Measure images a second of smallfry."""
    config = AugmentConfig(crop_padding=4, flip=True, randaugment_ops=2, mixup=0.2, cutmix=0.0)
    augment = Augment(config, 32, CLASSES, MEAN, STD, flip=True)
    order = torch.randperm(IMAGES)
    began = time.perf_counter()
    for rows in order.split(BATCH):
        augment(pixels[rows], labels[rows])
    return IMAGES / (time.perf_counter() - began)


def images(pictures: list[Image.Image], labels: Tensor) -> float:
    """Measure images a second of torchvision."""
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    mixup = v2.MixUp(alpha=0.2, num_classes=CLASSES)
    order = torch.randperm(IMAGES)
    began = time.perf_counter()
    for rows in order.split(BATCH):
        mixup(torch.stack([transform(pictures[i]) for i in rows.tolist()]), labels[rows])
    return IMAGES / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (IMAGES,))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    rounds = [
        (batches(pixels, labels), images(pictures, labels)) for _ in range(arguments.rounds + 1)
    ][1:]  # the first one warms up
    ours, theirs = (statistics.median(speeds) for speeds in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    print(f"smallfry         {ours:8,.0f} images/s")
    print(f"torchvision, PIL {theirs:8,.0f} images/s; ratio {ratio:.2f}, wanted {WANTED}")
    if arguments.out is not None:
        result = {"images_per_second": ours, "torchvision": theirs, "ratio": ratio}
        record = {"measured": result, "provenance": provenance(torch.device("cpu"))}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if ratio >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
