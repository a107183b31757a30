"""Overhead of the training loop, measured with a model that costs nothing.

    make bench            # or: python benchmarks/loop.py --rounds 5 --out results/loop.json

One core, random 32×32 RGB images, batch 128, crop, flip and Mixup; the model is a constant, so
what is left is the loop: augmentation, loss, optimizer, average, metrics, progress. Beside it, in
the same run and taken in turns, the same work as PyTorch's tutorials write it: a Dataset with
torchvision transforms per image, a DataLoader that collates, a plain loop with SGD.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from smallfry.data import ImageData, Split
from smallfry.tasks.classification import Classification
from smallfry.training.augment import Augment
from smallfry.training.config import AugmentConfig, OptimizerConfig, TrainConfig
from smallfry.training.loop import Trainer
from smallfry.training.objective import Supervised
from smallfry.training.progress import QuietReporter
from smallfry.training.provenance import provenance
from smallfry.training.run import RunFolder

IMAGES, BATCH, CLASSES = 12_800, 128, 10
MEAN, STD = (0.5,) * 3, (0.25,) * 3
WANTED = 3000  # images/s


class Constant(nn.Module):
    """Logits that do not depend on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def random_data() -> ImageData:
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8))
    labels = torch.from_numpy(generator.integers(0, CLASSES, IMAGES))
    rows = torch.arange(IMAGES)
    few = Split(pixels, rows[:CLASSES], labels[:CLASSES])
    names = tuple(map(str, range(CLASSES)))
    return ImageData("random", "random", names, 32, 3, Split(pixels, rows, labels), few, few)


def our_loop(data: ImageData) -> float:
    config = TrainConfig(
        augment=AugmentConfig(crop_padding=4, flip=True, mixup=0.2, cutmix=0.0),
        optimizer=OptimizerConfig("sgd", lr=1e-3),
        epochs=1,
        batch_size=BATCH,
        device="cpu",
        workers=0,
    )
    augment = Augment(config.augment, 32, CLASSES, MEAN, STD, flip=True)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        trainer = Trainer(
            Constant(),
            data,
            Supervised(Classification()),
            augment,
            config,
            run,
            {},
            QuietReporter(),
        )
        trainer.fit()
    return trainer.progress.history[0]["images_per_second"]


class Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, data: ImageData) -> None:
        self.split = data.train
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.split.pixels[i]), int(self.split.labels[i])


def tutorial_loop(data: ImageData) -> float:
    model = Constant()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    mixup = v2.MixUp(alpha=0.2, num_classes=CLASSES)
    loader = DataLoader(Images(data), batch_size=BATCH, shuffle=True, drop_last=True)
    began = time.perf_counter()
    for images, labels in loader:
        mixed, targets = mixup(images, labels)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(mixed), targets)
        loss.backward()
        optimizer.step()
        loss.item()
    return IMAGES / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    data = random_data()
    ours, theirs = [], []
    for number in range(arguments.rounds + 1):
        pair = our_loop(data), tutorial_loop(data)
        if number:  # the first round warms up
            ours.append(pair[0])
            theirs.append(pair[1])
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    speed, peer = statistics.median(ours), statistics.median(theirs)
    print(f"smallfry      {speed:8,.0f} images/s (from {min(ours):,.0f} to {max(ours):,.0f})")
    print(f"tutorial loop {peer:8,.0f} images/s; ratio {ratio:.2f}")
    print(f"wanted        {WANTED:8,} images/s: {'reached' if speed >= WANTED else 'MISSED'}")
    if arguments.out is not None:
        result = {"images_per_second": speed, "tutorial": peer, "ratio": ratio, "wanted": WANTED}
        record = {"measured": result, "provenance": provenance(torch.device("cpu"))}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if speed >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
