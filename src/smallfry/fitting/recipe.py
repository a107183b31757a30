"""Training recipe of candidates: the fast one, with batches for the number of images."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smallfry.data import ImageData
from smallfry.fitting.config import FitConfig
from smallfry.fitting.zoo import Entry
from smallfry.search.space import Choice
from smallfry.studies.config import ParetoConfig
from smallfry.studies.fast_recipe import fast_recipe, rates_of
from smallfry.studies.study_models import StudyModel
from smallfry.training.augment_config import AugmentConfig
from smallfry.training.config import ModelConfig, TrainConfig
from smallfry_runtime.frames import frame_of

STEPS = 20  # an epoch at least, as far as the smallest batch allows
SMALLEST_BATCH = 16
CONTINUED = 0.3  # of the learning rate, from pretrained weights
SMALLEST_CROPPED = 16  # pixels
CHOICES = (  # of the recipe, by its factors and names
    Choice("lr", low=0.3, high=3.0, log=True),
    Choice("augment", ("plain", "strong")),
)


def recipe(
    entry: Entry,
    config: FitConfig,
    data: ImageData,
    *,
    threads: int,
    epochs: int = 1,
    precision: str | None = None,
    start: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Build the training configuration of a candidate.

    Args:
        entry: Its architecture.
        config: The fit's settings.
        data: Gives the number of images.
        threads: CPU threads.
        epochs: Epochs of the first rung.
        precision: Precision; default that of the fast recipe.
        start: Trained model to start from.
        changes: Values of ``CHOICES``: a factor of the learning rate, and an augmentation.
    """
    changes, frame = changes or {}, frame_of(data.image_size)
    study = StudyModel(entry.name, entry.model, entry.options)
    settings = ParetoConfig(
        data=replace(config.data, image_size=frame.plain, channels=data.channels),
        device=config.device,
        precision=None if rates_of(study).precision == "32-true" else precision,
        threads=threads,
    )
    made = fast_recipe(study, settings, epochs, config.seed)
    batch = fitting_batch(made.images_per_step, len(data.train))
    rate = (made.optimizer.lr or 0.0) * math.sqrt(batch / made.images_per_step)
    rate *= float(changes.get("lr", 1.0)) * (1.0 if start is None else CONTINUED)
    model = made.model if start is None else ModelConfig(start=str(start))
    return replace(
        made,
        model=model,
        augment=_augment(made.augment, min(frame[:2]), changes.get("augment", "plain")),
        optimizer=replace(made.optimizer, lr=rate),
        batch_size=batch,
        test_flips=False,
    )


def fitting_batch(batch: int, images: int) -> int:
    """Return a batch size of which an epoch has enough steps.

    Example:
        >>> fitting_batch(512, 45_000), fitting_batch(512, 1_295), fitting_batch(512, 100)
        (512, 64, 16)
    """
    most = max(SMALLEST_BATCH, images // STEPS)
    return min(batch, 1 << most.bit_length() - 1)


def _augment(given: AugmentConfig, side: int, name: str) -> AugmentConfig:
    """Return crops after padding; strong adds blanked squares and mixed images."""
    if side < SMALLEST_CROPPED:
        cropped = given
    else:
        cropped = replace(given, crop_padding=given.crop_padding or side // 8)
    if name == "plain":
        return cropped
    return replace(cropped, cutout=max(cropped.cutout, side // 4), mixup=0.2)
