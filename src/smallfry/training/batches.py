"""Batches as a pure function of seed and step, which makes resuming exact.

Batch number ``step`` of a run, its images, their order, crops, flips, RandAugment, Mixup and
CutMix, depends on the seed and the step alone: not on earlier batches, worker processes, where the
run was stopped, or how many processes train on it. The random state of the augmentation is set anew
for each batch. Of several processes each makes its own part of a batch, and no more.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smallfry.data import ImageData, Split
from smallfry.data.stream import ShardPixels
from smallfry.errors import UsageError
from smallfry.tasks import Batch
from smallfry.training.augment import Augmentation, Place, beside
from smallfry.training.balance import class_draws
from smallfry.training.balance_config import SAMPLERS
from smallfry.training.processes import share_of
from smallfry.training.seeding import seed_generators

RESIDENT_SHARE = 0.25  # of the device's free memory that training images may take
CHARACTERS = frozenset({"digits", "mnist"})


def derive_seed(*key: int) -> int:
    """Derive a seed for the random stream of ``key``, independent of all other streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Result(NamedTuple):
    """Outcome of training on one batch."""

    loss: Tensor  # scalar, mean over its optimizer steps
    correct: Tensor  # scalar, samples whose last outputs are right
    halting: Tensor  # scalar, mean halting probability of the last step; nan where there is none
    steps: int  # optimizer steps taken
    judged: Tensor  # scalar, samples with something to be right about


class TrainBatches(Dataset[Batch]):
    """Batches of a run by step number, or the part of one of several processes.

    Args:
        split: The training images.
        augment: Augmentation of the images.
        batch_size: Images in a whole batch.
        seed: Seed of order and augmentation.
        rank: Rank of this process.
        processes: Number of processes.
        epochs: Epochs of the whole training, over which ``augment.sizes`` are spread.
        sampler: Name of one of ``SAMPLERS``; otherwise an epoch has every image once.
    """

    def __init__(
        self,
        split: Split,
        augment: Augmentation,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        epochs: int = 1,
        sampler: str = "none",
    ) -> None:
        self.split = split
        self.augment = augment
        self.batch_size = min(batch_size, len(split))
        self.seed = seed
        self.steps_per_epoch = len(split) // self.batch_size  # the rest takes part next epoch
        if self.batch_size < processes:
            raise UsageError(
                f"{processes} processes can't share a batch of {self.batch_size} images: start "
                "fewer, or raise batch_size"
            )
        self.place = augment.needed(share_of(self.batch_size, rank, processes), self.batch_size)
        self.epochs, self.sampler = epochs, sampler
        self._order: tuple[int, Tensor] | None = None
        self._mirrored_first = torch.zeros(0, dtype=torch.bool)  # of all images, in epoch 0
        if augment.alternates:
            generator = torch.Generator().manual_seed(derive_seed(seed, 3))
            self._mirrored_first = torch.rand(len(split), generator=generator) < 0.5

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch)
        rows = self._order_of(epoch)[position * self.batch_size + self.place.rows]
        chosen = self.split.take(beside(self.split.rows, rows))
        images = chosen.images
        with torch.random.fork_rng(devices=[]):
            seed_generators(derive_seed(self.seed, 1, step), images.device)
            return self.augment(images, chosen.labels, self._place(step, rows))

    def _place(self, step: int, rows: Tensor) -> Place:
        """Return this process's part of a step, with its step-dependent choices."""
        place, sizes = self.place, self.augment.sizes
        epoch = step // self.steps_per_epoch
        if self.augment.alternates:
            place = place._replace(mirrored=self._mirrored_first[rows] ^ bool(epoch % 2))
        if sizes:
            part = step * len(sizes) // (self.epochs * self.steps_per_epoch)
            place = place._replace(size=sizes[min(part, len(sizes) - 1)])
        return place

    def _order_of(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
            split, draws = self.split, None
            if self.sampler in SAMPLERS:
                draws = class_draws(split.labels, SAMPLERS[self.sampler], generator)
                split = split.take(beside(split.rows, draws))
            order = split.shuffled(generator)
            if self.augment.repeats > 1:
                order = order.repeat_interleave(self.augment.repeats)[: len(order)]
            self._order = (epoch, order if draws is None else draws[order])
        return self._order[1]


def resident(split: Split, device: torch.device, wanted: bool | None) -> Split:
    """Move the split's images to the device if requested, or by default if they fit well.

    Args:
        split: The split.
        device: Device of the batches.
        wanted: True to move the images; None decides by the device's free memory.

    Raises:
        UsageError: It is wanted of images that are streamed.
    """
    if isinstance(split.pixels, ShardPixels):
        if wanted:
            raise UsageError(
                "resident keeps all training images on the device, and data.stream none of them; "
                "leave one of them out"
            )
        return split
    if device.type == "cpu" or len(split) == 0 or wanted is False:
        return split
    if wanted is None:
        if device.type != "cuda":
            return split
        free, _ = torch.cuda.mem_get_info(device)
        if len(split) * split.pixels[0].nbytes > RESIDENT_SHARE * free:
            return split
    labels = split.labels.to(device)
    return Split(split.images.to(device), torch.arange(len(split), device=device), labels)


def flips_by_default(data: ImageData) -> bool:
    """Return whether mirrored images of this data set keep their class."""
    return data.name not in CHARACTERS
