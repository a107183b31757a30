"""Settings of the augmentation of training images."""

from dataclasses import dataclass, field
from typing import Literal

from smallfry.settings import check, check_values

MOST_PADDING = 4096  # pixels, as of an image's side
MOST_OPERATIONS = 100  # of RandAugment on one image


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images; evaluation images are left as they are.

    Args:
        resized_crop: Random crop of at least this share of the area, resized to the full size; 0
            turns it off. Default 0.25 for images of 64 pixels and more, without crop_padding.
        crop_padding: Random crop after padding by so many pixels; default an eighth of the side,
            and none on images smaller than 16 pixels, with resized_crop, or where a model with
            random weights sees fewer than 20,000 images in all epochs.
        border: The padding of a crop: black, or the image mirrored at its edge (reflect).
        flip: Random horizontal flip; default yes, but not for digits and characters, nor where a
            model with random weights sees fewer than 20,000 images in all epochs.
        flips: random mirrors half of the images anew in each epoch; alternating mirrors each image
            in every other epoch, half of them in the first (arXiv 2404.00498).
        cutout: Side in pixels of a square that is blanked anywhere in each image; 0 turns it off.
        sizes: Sides in pixels of the images in equal parts of the training, such as [24, 28, 32],
            for models that take images of any size; default the full size throughout.
        randaugment_ops: RandAugment operations per image; 0 turns it off.
        randaugment_magnitude: Their magnitude, 0 to 30.
        policy: Operations of torchvision on each image: trivial (TrivialAugment), augmix, or an
            AutoAugment policy.
        color_jitter: Largest changes of brightness, contrast, saturation and hue, such as
            [0.4, 0.4, 0.4, 0.1]; fewer leave the others unchanged.
        erasing: Probability of an image to have a random rectangle erased.
        repeats: How often a batch has each of its images, augmented differently; an epoch has as
            many steps, of fewer images (arXiv 1901.09335).
        mixup: Alpha of Mixup; 0 turns it off. With CutMix too, each batch takes one or the other.
            Default 0.2 in runs of 50 epochs and more that see 50,000 images, else 0.
        cutmix: Alpha of CutMix; 0 turns it off. Default 1 in such runs, else 0.
    """

    resized_crop: float | None = None
    crop_padding: int | None = None
    border: Literal["black", "reflect"] = "black"
    flip: bool | None = None
    flips: Literal["random", "alternating"] = "random"
    cutout: int = 0
    sizes: list[int] = field(default_factory=list)
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    policy: Literal[
        "none",
        "trivial",
        "augmix",
        "autoaugment_cifar10",
        "autoaugment_imagenet",
        "autoaugment_svhn",
    ] = "none"
    color_jitter: list[float] = field(default_factory=list)
    erasing: float = 0.0
    repeats: int = 1
    mixup: float | None = None
    cutmix: float | None = None

    def __post_init__(self) -> None:
        check_values(self, "augment.")
        padding = f"augment.crop_padding is 0 to {MOST_PADDING}"
        check(0 <= (self.crop_padding or 0) <= MOST_PADDING, padding)
        operations = f"augment.randaugment_ops is 0 to {MOST_OPERATIONS}"
        check(0 <= self.randaugment_ops <= MOST_OPERATIONS, operations)
        check(0 <= self.randaugment_magnitude <= 30, "augment.randaugment_magnitude is 0 to 30")
        check(0 <= (self.resized_crop or 0) <= 1, "augment.resized_crop is 0 to 1")
        both = self.resized_crop and self.crop_padding
        check(not both, "augment.resized_crop excludes augment.crop_padding: leave one of them out")
        jitter = [*self.color_jitter, *(0.0,) * (4 - len(self.color_jitter))]
        check(
            len(jitter) == 4 and 0 <= min(jitter) <= max(jitter) <= 1 and jitter[3] <= 0.5,
            "augment.color_jitter is up to 4 numbers from 0 to 1, the last at most 0.5",
        )
        check(0 <= self.erasing <= 1, "augment.erasing is 0 to 1")
        check(1 <= self.repeats <= MOST_OPERATIONS, f"augment.repeats is 1 to {MOST_OPERATIONS}")
        mixing = (self.mixup or 0, self.cutmix or 0)
        check(min(mixing) >= 0, "augment.mixup and cutmix can't be negative")
        check(0 <= self.cutout <= MOST_PADDING, f"augment.cutout is 0 to {MOST_PADDING}")
        check(all(1 <= s <= MOST_PADDING for s in self.sizes), "augment.sizes must be positive")
