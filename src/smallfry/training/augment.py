"""Augmentation of whole batches of images, on their device.

Each image takes random choices of its own: they are drawn on the CPU, from PyTorch's global random
state, and images with the same choice are then worked on together. So a batch is the same wherever
it is made, and made for much less than image by image. The operations are torchvision's.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from smallfry.errors import UsageError
from smallfry.tasks import Batch
from smallfry.tasks.classification import ClassTargets
from smallfry.training.augment_place import Place as Place
from smallfry.training.augment_place import beside as beside
from smallfry.training.augment_place import whole as whole
from smallfry.training.augment_policies import POLICIES, RandomPolicy, jitter_operations
from smallfry.training.augment_regions import random_erasing, random_resized_crop
from smallfry.training.config import AugmentConfig
from smallfry_runtime.frames import Frame, ImageSize, frame_of

SMALLEST_CROPPED = 16  # on an 8×8 image a pixel is an eighth of it, and shifting it hurts
MAGNITUDES = 31  # of RandAugment, from 0 to 30

Operation = Callable[[Tensor], Tensor]


class Augmentation(Protocol):
    """Training batches from images and labels."""

    alternates: bool  # mirrors an image in every other epoch
    sizes: Sequence[int]  # sides of the images in equal parts of the training; none for full size
    repeats: int  # how often an image of a batch is in it
    classes: int
    normalize: "Normalize"

    def needed(self, part: slice, count: int) -> Place:
        """Return the images that a part of a batch needs."""

    def __call__(self, images: Tensor, labels: Tensor, place: Place | None = None) -> Batch:
        """Make a batch of uint8 images with int64 labels."""


class Augment:
    """Augmentation of uint8 images to a training batch.

    Args:
        config: Augmentation settings.
        image_size: Side of square images in pixels, or height and width.
        classes: Number of classes.
        mean: Mean per channel, on the scale 0 to 1.
        std: Standard deviation per channel.
        flip: Default for an unset ``config.flip``.
        targets: Targets of labels and class shares, as ``Task.targets``; default those of
            classification.
    """

    def __init__(
        self,
        config: AugmentConfig,
        image_size: ImageSize,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool,
        targets: Callable[[Tensor, Tensor], Any] = ClassTargets,
    ) -> None:
        frame = frame_of(image_size)
        height, width = frame[:2]
        if config.sizes and height != width:
            raise UsageError(
                f"augment.sizes are sides of squares, and these images are {height}×{width}: leave "
                "them out"
            )
        self.steps: list[Callable[..., Tensor]] = []
        padding = config.crop_padding
        if config.resized_crop:
            self.steps.append(partial(random_resized_crop, smallest=config.resized_crop))
        elif padding is None:
            shorter = min(height, width)
            padding = shorter // 8 if shorter >= SMALLEST_CROPPED else 0
        if padding:
            self.steps.append(partial(random_crop, padding=padding, border=config.border))
        flips = flip if config.flip is None else config.flip
        self.alternates = flips and config.flips == "alternating"
        self.sizes: Sequence[int] = config.sizes
        self.repeats = config.repeats
        if flips:
            self.steps.append(random_flip)
        operations = rand_augment_operations(config.randaugment_magnitude, frame)
        self.steps += [partial(apply_one_of, operations=operations)] * config.randaugment_ops
        if config.policy in POLICIES:
            self.steps.append(RandomPolicy(config.policy, min(height, width)))
        for each in jitter_operations(config.color_jitter):
            self.steps.append(partial(apply_one_of, operations=each))
        mixing = []
        if config.mixup:
            mixing.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
        if config.cutmix:
            mixing.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
        self.classes, self.targets = classes, targets
        self.mix = v2.RandomChoice(mixing) if mixing else None
        self.normalize = Normalize(mean, std)
        self.cutout, self.erasing = config.cutout, config.erasing

    def needed(self, part: slice, count: int) -> Place:
        """Return the images that a part of a batch needs, including the mixing partners."""
        borrowed = int(self.mix is not None and part.stop - part.start < count)
        return Place(torch.arange(part.start - borrowed, part.stop) % count, count, borrowed)

    def __call__(self, images: Tensor, labels: Tensor, place: Place | None = None) -> Batch:
        """Augment images (batch, channels, height, width) with labels (batch, …).

        Where ``place`` is a part of a batch, what ``needed`` borrowed for it is left out.
        """
        place = place or whole(images)
        for step in self.steps:
            images = step(images, place=place)
        images = self.normalize(images)
        if self.cutout:
            images = random_cutout(images, self.cutout, place)
        if self.erasing:
            images = random_erasing(images, self.erasing, place)
        if place.size is not None and place.size != images.shape[-1]:
            images = tv.resize(images, [place.size, place.size], antialias=True)
        if self.mix is None:
            has_class = labels.ndim == 1 and not labels.is_floating_point()
            shares = (F.one_hot(labels, self.classes) if has_class else labels).to(images.dtype)
            return Batch(images, self.targets(labels, shares))
        mixed, shares = self.mix(images, labels)
        kept = slice(place.borrowed, None)
        return Batch(mixed[kept], self.targets(labels[kept], shares[kept]))


class Normalize:
    """Normalisation of images to mean 0 and deviation 1 per channel.

    Args:
        mean: Of each channel, of uint8 pixels on the scale 0 to 1, of float32 values as they are.
        std: Standard deviation, on the same scale.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self.scale_floats = torch.tensor([1 / s for s in std]).view(-1, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images (..., channels, height, width)."""
        shift = beside(images, self.shift)
        if images.is_floating_point():
            return images.to(torch.float32) * beside(images, self.scale_floats) + shift
        return images.to(torch.float32).mul_(beside(images, self.scale)).add_(shift)


def random_crop(
    images: Tensor, padding: int, place: Place | None = None, border: str = "black"
) -> Tensor:
    """Crop images at random offsets with black or reflected borders, keeping their size."""
    count, _, height, width = images.shape
    place = place or whole(images)
    top, left = beside(images, place.own(torch.randint(2 * padding + 1, (2, place.total))))
    if border == "reflect":
        rows, columns = (mirrored(n, padding).to(images.device) for n in (height, width))
        padded = images[:, :, rows][..., columns]
    else:
        padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=images.device), :, top, left]


def mirrored(pixels: int, padding: int) -> Tensor:
    """Return indices of a row of pixels with reflected borders."""
    period = max(1, 2 * (pixels - 1))
    places = torch.arange(-padding, pixels + padding).remainder(period)
    return torch.minimum(places, period - places) if pixels > 1 else places


def random_flip(images: Tensor, place: Place | None = None) -> Tensor:
    """Mirror half of the images, at random or as given by ``place``."""
    place = place or whole(images)
    chosen = place.mirrored
    if chosen is None:
        chosen = place.own(torch.rand(place.total)) < 0.5
    return torch.where(beside(images, chosen)[:, None, None, None], images.flip(-1), images)


def random_cutout(images: Tensor, side: int, place: Place | None = None) -> Tensor:
    """Set a random square of each normalised image to zero, the mean of the data.

    Source: DeVries and Taylor 2017, "Cutout", arXiv 1708.04552; part of a square can lie outside.
    """
    place = place or whole(images)
    height, width = images.shape[-2:]
    middle = beside(images, place.own(torch.rand(2, place.total)))
    inside = []
    for drawn, pixels in zip(middle, (height, width), strict=True):
        first = (drawn * pixels).floor().long() - side // 2
        at = torch.arange(pixels, device=images.device) - first[:, None]
        inside.append((at >= 0) & (at < side))
    blank = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(blank, 0.0)


def apply_one_of(
    images: Tensor, operations: Sequence[Operation], place: Place | None = None
) -> Tensor:
    """Apply one of the operations to every image, all equally likely."""
    place = place or whole(images)
    choice = place.own(torch.randint(len(operations), (place.total,)))
    order = choice.argsort(stable=True)
    counts = torch.bincount(choice, minlength=len(operations)).tolist()
    groups = torch.split(images[beside(images, order)], counts)
    done = [
        operation(group) for operation, group in zip(operations, groups, strict=True) if len(group)
    ]
    return torch.cat(done)[beside(images, order.argsort())]


def rand_augment_operations(magnitude: int, size: ImageSize | Frame) -> list[Operation]:
    """List RandAugment's operations, signed ones in both directions and others twice.

    Source: Cubuk et al., "RandAugment", arXiv 1909.13719, with the ranges of torchvision.

    Args:
        magnitude: 0 to 30.
        size: Side of square images in pixels, or height and width.
    """
    height, width = frame_of(size)[:2]
    share = magnitude / (MAGNITUDES - 1)
    still: dict[str, Any] = {"angle": 0.0, "scale": 1.0, "translate": [0, 0], "shear": [0.0, 0.0]}
    moved = partial(tv.affine, **still)
    operations: list[Operation] = []
    for sign in (1, -1):
        shear = math.degrees(math.atan(sign * 0.3 * share))
        right, down = (int(sign * 150 / 331 * side * share) for side in (width, height))
        factor = 1 + sign * 0.9 * share
        operations += [
            torch.clone,
            partial(moved, shear=[shear, 0.0], center=[0.0, 0.0]),
            partial(moved, shear=[0.0, shear], center=[0.0, 0.0]),
            partial(moved, translate=[right, 0]),
            partial(moved, translate=[0, down]),
            partial(tv.rotate, angle=sign * 30 * share),
            partial(tv.adjust_brightness, brightness_factor=factor),
            partial(tv.adjust_saturation, saturation_factor=factor),
            partial(tv.adjust_contrast, contrast_factor=factor),
            partial(tv.adjust_sharpness, sharpness_factor=factor),
            partial(tv.posterize, bits=8 - round(4 * share)),
            partial(tv.solarize, threshold=255 * (1 - share)),
            tv.autocontrast,
            tv.equalize,
        ]
    return operations
