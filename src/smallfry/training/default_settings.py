"""Default settings of a new run by its images, its epochs and its model.

They become part of the configuration, so that a run resumes with them. `benchmarks/first_run.py`
compares them with a plain loop of AdamW; docs/training.md has them as a table.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from smallfry.errors import UsageError
from smallfry.optim import METHODS
from smallfry.tasks import LimitsAugmentation, find_task
from smallfry.training.config import (
    BATCH,
    CLASSIFICATION,
    MULTILABEL,
    AugmentConfig,
    TrainConfig,
)
from smallfry_runtime.frames import ImageSize, frame_of

PHOTOGRAPH = 64  # pixels of a side, from which images are cropped and resized
SMALLEST_AREA = 0.25  # of such a crop, as a share of the image
FEW = 20_000  # images seen in all epochs, below which crops and mirrors cost more than they bring
STEPS, BATCHES = 1000, (BATCH, 32, 16)  # of a run, as far as the smallest batch allows
MIXUP, CUTMIX = 0.2, 1.0
MIXED_EPOCHS, MIXED = 50, 50_000  # epochs, and images seen in them, from which on images are mixed
WARMUP_EPOCHS, WARMUP_PARTS = 5.0, 10
SGD = re.compile("sgd|momentum|nesterov")  # in timm's registry
SGD_RATE = 0.02  # 6 epochs of digits: ViTRM 77 %, a small ResNet 94 %; 65 and 43 with AdamW's
OFF: Mapping[str, Any] = {
    "resized_crop": 0.0,
    "crop_padding": 0,
    "flip": False,
    "mixup": 0.0,
    "cutmix": 0.0,
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ADAM = ("adam", "adamw", "nadam", "nadamw", "radam", "adam_atan2")
NORMED_RATE = 2e-3  # of Adam on networks with batch norms, whose width matters little


def with_defaults(
    config: TrainConfig, images: int, image_size: ImageSize, processes: int = 1
) -> TrainConfig:
    """Choose the settings that are not given.

    Args:
        config: The given settings.
        images: Number of training images.
        image_size: Their side in pixels, or height and width.
        processes: That share a batch.
    """
    config = with_true_labels(config)
    config = with_fitting_batch(with_sgd_rate(with_fitting_warmup(config)), images, processes)
    return with_mixing(with_fitting_crop(config, images, image_size), images)


def with_true_labels(config: TrainConfig) -> TrainConfig:
    """Turn off by default what would make the labels of a task untrue of an augmented image.

    Raises:
        UsageError: It was asked for.
    """
    task = find_task(config.task)
    if not isinstance(task, LimitsAugmentation):
        return config
    off = {name: value for name, value in OFF.items() if name not in task.augmentations}
    given = {each.name: getattr(config.augment, each.name) for each in fields(config.augment)}
    usual = {each.name: getattr(AugmentConfig(), each.name) for each in fields(config.augment)}
    for name, value in given.items():
        if name not in task.augmentations and value not in (usual[name], off.get(name)):
            known = ", ".join(sorted(task.augmentations)) or "none"
            raise UsageError(
                f"the labels of {config.task} would not hold for images changed by augment.{name}: "
                f"leave it out ({known} may be set)"
            )
    if config.test_flips and "flip" not in task.augmentations:
        raise UsageError(
            f"the outputs of {config.task} do not hold for mirrored images: leave out test_flips"
        )
    return replace(config, augment=replace(config.augment, **off))


def with_fitting_batch(config: TrainConfig, images: int, processes: int = 1) -> TrainConfig:
    """Choose the largest batch of 64, 32 and 16 images that gives 1,000 steps, or the smallest.

    Models with weights of their own, natural gradient, tasks without classes and several processes,
    of which each needs its share, keep 64.
    """
    if config.batch_size is not None:
        return config
    batch = BATCH
    is_new = config.model.start is None and config.task in (CLASSIFICATION, MULTILABEL)
    if processes == 1 and is_new and config.optimizer.name not in METHODS:
        taken = [n for n in BATCHES if n >= config.accumulate]
        enough = [n for n in taken if config.epochs * images >= STEPS * n]
        batch = (enough or taken[-1:])[0]
    return replace(config, batch_size=batch)


def with_fitting_warmup(config: TrainConfig) -> TrainConfig:
    """Choose a warm-up of a tenth of the run and at most 5 epochs, or shorten a given one.

    After a warm-up of more than half of a run the learning rate would hardly come to its peak, or
    never: it is shortened to a tenth.
    """
    given, share = config.schedule.warmup_epochs, config.epochs / WARMUP_PARTS
    if given is not None and 2 * given <= config.epochs:
        return config
    warmup = min(WARMUP_EPOCHS, share) if given is None else share
    return replace(config, schedule=replace(config.schedule, warmup_epochs=warmup))


def with_sgd_rate(config: TrainConfig) -> TrainConfig:
    """Choose the learning rate of SGD.

    AdamW's is far too low for it. Runs of earlier versions, which recorded none, keep AdamW's.
    """
    optimizer = config.optimizer
    if optimizer.lr is not None or SGD.search(optimizer.name) is None:
        return config
    return replace(config, optimizer=replace(optimizer, lr=SGD_RATE))


def with_normed_rate(config: TrainConfig, model: nn.Module) -> TrainConfig:
    """Choose the learning rate of Adam's family for a model with batch norms.

    The default for other models falls with their width, which would be far too low for a
    MobileNet: its last layer is wide, and the scale of its weights is free.
    """
    optimizer = config.optimizer
    normed = any(isinstance(module, BATCH_NORMS) for module in model.modules())
    if optimizer.lr is not None or optimizer.name not in ADAM or not normed:
        return config
    return replace(config, optimizer=replace(optimizer, lr=NORMED_RATE))


def with_fitting_crop(config: TrainConfig, images: int, image_size: ImageSize) -> TrainConfig:
    """Choose resized crops for images of 64 pixels and more, and padded ones for smaller images.

    A model with random weights that sees few images is given them whole, and not mirrored.
    """
    augment = config.augment
    few = config.model.start is None and config.epochs * images < FEW
    if few and config.task != "puzzle" and (augment.flip, augment.flips) == (None, "random"):
        augment = replace(augment, flip=False)
        config = replace(config, augment=augment)
    if augment.resized_crop is not None or config.task == "puzzle":
        return replace(config, augment=replace(augment, resized_crop=augment.resized_crop or 0.0))
    padding, area = augment.crop_padding, 0.0
    if padding is None and few:
        padding = 0
    elif padding is None and min(frame_of(image_size)[:2]) >= PHOTOGRAPH:
        area = SMALLEST_AREA
    return replace(config, augment=replace(augment, crop_padding=padding, resized_crop=area))


def with_mixing(config: TrainConfig, images: int) -> TrainConfig:
    """Choose Mixup and CutMix for classification in long runs."""
    if config.task != "classification":
        return config
    mixed = config.epochs >= MIXED_EPOCHS and config.epochs * images >= MIXED
    augment = config.augment
    mixup = (MIXUP if mixed else 0.0) if augment.mixup is None else augment.mixup
    cutmix = (CUTMIX if mixed else 0.0) if augment.cutmix is None else augment.cutmix
    return replace(config, augment=replace(augment, mixup=mixup, cutmix=cutmix))


def describe_batch(given: TrainConfig, images: int) -> str:
    """Describe batches that were to be larger than the training split; empty for others."""
    if given.batch_size is None or given.batch_size <= images:
        return ""
    return f"batches of all {images:,} images, as batch_size {given.batch_size:,} is more"


def describe_defaults(given: TrainConfig, chosen: TrainConfig, images: int) -> str:
    """List the settings that were not given, in one line; empty if all were."""
    found = []
    if given.batch_size is None and chosen.batch_size not in (None, BATCH):
        found.append(f"batches of {chosen.batch_size}")
    if given.schedule.warmup_epochs is None:
        found.append(f"warm-up of {chosen.schedule.warmup_epochs:g} epochs")
    if given.optimizer.lr is None and chosen.optimizer.lr is not None:
        found.append(f"learning rate {chosen.optimizer.lr:g}")
    for name, label in (("mixup", "Mixup"), ("cutmix", "CutMix")):
        value = getattr(chosen.augment, name)
        if getattr(given.augment, name) is None and value is not None:
            found.append(f"{label} {value:g}" if value else f"no {label}")
    if given.augment.resized_crop is None and chosen.augment.resized_crop:
        found.append(f"crops of at least {chosen.augment.resized_crop:.0%} of the area")
    if given.augment.crop_padding is None and chosen.augment.crop_padding == 0:
        found.append("no random crops")
    if given.augment.flip is None and chosen.augment.flip is False:
        found.append("no mirrored images")
    epochs = "epoch" if chosen.epochs == 1 else "epochs"
    return f"{chosen.epochs} {epochs} of {images:,} images: {', '.join(found)}" if found else ""
