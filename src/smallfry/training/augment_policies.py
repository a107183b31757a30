"""Augmentation of colours, and policies of torchvision that choose operations image by image."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from smallfry.errors import UsageError
from smallfry.training.augment_place import Place, whole
from smallfry.training.seeding import seed_generators

FARTHEST = 32  # pixels by which TrivialAugment shifts
LEVELS = 11  # of each strength of colour jitter, evenly spaced
POLICIES: dict[str, Callable[[], v2.Transform]] = {
    "trivial": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
    "autoaugment_cifar10": partial(v2.AutoAugment, v2.AutoAugmentPolicy.CIFAR10),
    "autoaugment_imagenet": partial(v2.AutoAugment, v2.AutoAugmentPolicy.IMAGENET),
    "autoaugment_svhn": partial(v2.AutoAugment, v2.AutoAugmentPolicy.SVHN),
}


class RandomPolicy:
    """Policy of torchvision, applied to each image with a seed of its own.

    Args:
        name: One of ``POLICIES``.
        image_size: Side of the images in pixels, the shorter one of rectangles.

    Raises:
        UsageError: Images that TrivialAugment would shift out of sight.
    """

    def __init__(self, name: str, image_size: int) -> None:
        if name == "trivial" and image_size < FARTHEST:
            raise UsageError(
                f"augment.policy trivial shifts images by up to {FARTHEST} pixels, and these have "
                f"{image_size}: take augment.randaugment_ops"
            )
        self.policy = POLICIES[name]()

    def __call__(self, images: Tensor, place: Place | None = None) -> Tensor:
        """Augment images (images, channels, height, width), uint8."""
        place = place or whole(images)
        seeds = place.own(torch.randint(2**62, (place.total,))).tolist()
        done = []
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(images, seeds, strict=True):
                seed_generators(seed, images.device)
                done.append(self.policy(image))
        return torch.stack(done) if done else images


def jitter_operations(strengths: Sequence[float]) -> list[list[Callable[[Tensor], Tensor]]]:
    """List the operations of colour jitter, equally likely ones of 11 strengths for each property.

    Args:
        strengths: Largest change of brightness, contrast, saturation and hue, as torchvision's
            ``ColorJitter``; hue at most 0.5.
    """
    kinds = (
        partial(_adjusted, tv.adjust_brightness, 1.0),
        partial(_adjusted, tv.adjust_contrast, 1.0),
        partial(_adjusted, tv.adjust_saturation, 1.0),
        partial(_adjusted, tv.adjust_hue, 0.0),
    )
    return [kind(strength) for kind, strength in zip(kinds, strengths, strict=False) if strength]


def _adjusted(
    function: Callable[..., Tensor], middle: float, strength: float
) -> list[Callable[[Tensor], Tensor]]:
    """Return a function of images for each strength."""
    least = middle - strength  # no factor is negative, as strengths are at most 1
    factors = torch.linspace(least, middle + strength, LEVELS, dtype=torch.float64)

    def adjust(images: Tensor, factor: float) -> Tensor:
        return function(images, factor)

    return [partial(adjust, factor=factor) for factor in factors.tolist()]
