"""Batches as a pure function of seed and step, so that a resumed run sees what it would have seen.

Batch number ``step`` of a run, its images, their order, crops, flips, RandAugment, Mixup and
CutMix, depends on the seed and the step alone: not on earlier batches, worker processes or where
the run was stopped. Augmentation is torchvision's; its random state is set anew for each batch.
"""

import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from smallfry.data import ImageData, Split
from smallfry.training.config import AugmentConfig
from smallfry.training.objective import Batch

SMALLEST_CROPPED = 16  # on an 8×8 image a pixel is an eighth of it, and shifting it hurts
CHARACTERS = frozenset({"digits", "mnist"})


def derive_seed(*key: int) -> int:
    """A seed for the random stream that ``key`` names, independent of all other streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Augment:
    """Turns uint8 images into a batch to train on: per image, then per batch.

    Args:
        config: What to do.
        image_size: Side of the images in pixels.
        classes: Number of classes.
        mean: Mean per channel, on the scale 0 to 1.
        std: Standard deviation per channel.
        flip: Whether ``config.flip`` unset means yes.
    """

    def __init__(
        self,
        config: AugmentConfig,
        image_size: int,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool,
    ) -> None:
        padding = config.crop_padding
        if padding is None:
            padding = image_size // 8 if image_size >= SMALLEST_CROPPED else 0
        per_image: list[Any] = []
        if padding:
            per_image.append(v2.RandomCrop(image_size, padding=padding))
        if flip if config.flip is None else config.flip:
            per_image.append(v2.RandomHorizontalFlip())
        if config.randaugment_ops:
            per_image.append(v2.RandAugment(config.randaugment_ops, config.randaugment_magnitude))
        mixing = []
        if config.mixup:
            mixing.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
        if config.cutmix:
            mixing.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
        self.classes = classes
        self.per_image = v2.Compose(per_image) if per_image else None
        self.mix = v2.RandomChoice(mixing) if mixing else None
        self.normalize = Normalize(mean, std)

    def __call__(self, images: Tensor, labels: Tensor) -> Batch:
        """The batch of images (batch, channels, size, size), uint8, with int64 labels."""
        if self.per_image is not None:
            images = torch.stack([self.per_image(image) for image in images])
        images = self.normalize(images)
        if self.mix is None:
            return Batch(images, labels, F.one_hot(labels, self.classes).to(images.dtype))
        mixed, targets = self.mix(images, labels)
        return Batch(mixed, labels, targets)


class Normalize:
    """uint8 images to floats with mean 0 and deviation 1 per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (..., channels, height, width)."""
        return images.to(torch.float32).mul_(self.scale).add_(self.shift)


class TrainBatches(Dataset[Batch]):
    """The batches of a run, by step number."""

    def __init__(self, split: Split, augment: Augment, batch_size: int, seed: int) -> None:
        self.split = split
        self.augment = augment
        self.batch_size = min(batch_size, len(split))
        self.seed = seed
        self.steps_per_epoch = len(split) // self.batch_size  # the rest takes part next epoch
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch)
        rows = self._order_of(epoch)[position * self.batch_size :][: self.batch_size]
        chosen = self.split.take(rows)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, 1, step))
            return self.augment(chosen.images, chosen.labels)

    def _order_of(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
            self._order = (epoch, torch.randperm(len(self.split), generator=generator))
        return self._order[1]


def train_loader(
    batches: TrainBatches, steps: range, workers: int | None, pin_memory: bool
) -> DataLoader[Batch]:
    """A loader of those steps, prepared ahead by worker processes where that pays."""
    if workers is None:
        heavy = len(batches.split) * batches.split.pixels[0].numel() > 10**7
        workers = min(8, (os.cpu_count() or 1) - 1) if heavy and pin_memory else 0
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent if workers else None,
    )


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C reaches the workers too; the batches they prepare are still wanted to save well."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def flips_by_default(data: ImageData) -> bool:
    """Whether a mirrored image of this data set still belongs to its class."""
    return data.name not in CHARACTERS
