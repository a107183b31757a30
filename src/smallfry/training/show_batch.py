"""Picture of the first images of a training run, as the model would see them."""

from pathlib import Path

import torch
from torch import Tensor

from smallfry.data import ImageData
from smallfry.errors import RunError, UsageError
from smallfry.report.batch import draw_batch
from smallfry.tasks import create_task
from smallfry.training.augment import Normalize
from smallfry.training.augment_grids import build_augment
from smallfry.training.batches import TrainBatches
from smallfry.training.config import CLASSIFICATION, MULTILABEL, AugmentConfig, TrainConfig
from smallfry.training.default_settings import with_defaults
from smallfry.training.evaluation_data import load_config_data
from smallfry.training.fine_tuning import like_start, load_start
from smallfry.training.initial_weights import find_weights, like_weights

SHOWN = 48  # images
OFF_AT_ZERO = ("resized_crop", "mixup", "cutmix")


def show_batch(config: TrainConfig, file: str | Path) -> Path:
    """Draw the first images of a run with their augmentation, without training.

    Args:
        config: Configuration of the run.
        file: The PNG to write, replacing another one.

    Raises:
        UsageError: Another task, a file of another kind, or an impossible setting.
        DataError: The data can't be used.
        RunError: The file can't be written.
    """
    file = Path(file).expanduser()
    if file.suffix.lower() != ".png":
        raise UsageError(f"{file}: expected a name that ends in .png")
    if config.task not in (CLASSIFICATION, MULTILABEL):
        raise UsageError(f"show_batch draws images of classes, not of the task {config.task}")
    if weights := find_weights(config.model):
        config = like_weights(config, weights)
    if begun := load_start(config.model):
        config = like_start(config, begun)
    data = load_config_data(config.data)
    config = with_defaults(config, len(data.train), data.image_size)
    images, shares = _first_images(config, data)
    normalize = Normalize(config.data.mean or data.mean, config.data.std or data.std)
    values = (images - normalize.shift) / normalize.scale
    pixels = values.round().clamp(0, 255).to(torch.uint8)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_batch(pixels, shares, data.classes, describe(config.augment), file)
    except OSError as error:
        raise RunError(f"{file}: can't be written ({error})") from error
    return file


def _first_images(config: TrainConfig, data: ImageData) -> tuple[Tensor, Tensor]:
    """Return the images of the first batches, in their order, and the shares of their classes."""
    augment = build_augment(config, data, create_task(config.task))
    batches = TrainBatches(
        *(data.train, augment, config.images_per_step, config.seed),
        epochs=config.epochs,
        sampler=config.balance.sampler,
    )
    steps = min(-(-SHOWN // batches.batch_size), batches.steps_per_epoch)
    found = [batches[step] for step in range(steps)]
    images = torch.cat([batch.inputs for batch in found])[:SHOWN]
    return images, torch.cat([batch.targets.shares for batch in found])[:SHOWN]


def describe(config: AugmentConfig) -> str:
    """List the settings of an augmentation that are not the default."""
    default, settings = vars(AugmentConfig()), vars(config)
    changed = {
        name: value
        for name, value in settings.items()
        if value != default[name] and (value or name not in OFF_AT_ZERO)
    }
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "default augmentation"
