"""Data of a training: what it requires of images and labels, and what it warns of."""

import warnings

from smallfry.data import ImageData
from smallfry.errors import DataError, SmallfryWarning, UsageError
from smallfry.training.balance import describe_small_classes
from smallfry.training.config import MULTILABEL, TrainConfig
from smallfry.training.evaluation_data import load_config_data

__all__ = ["load_training_data", "warn_of_data"]


def load_training_data(config: TrainConfig) -> ImageData:
    """Load the data of a training.

    Raises:
        UsageError: An unknown name, or settings that do not fit the data.
        DataError: It can't be used, or has too few images for its splits.
    """
    wanted = config.data
    data = load_config_data(wanted)
    if len(data.train) < 2:
        raise DataError(
            f"{data.origin}: too few images to train on ({len(data.train)}): two are the least; "
            "add some, or hold out fewer with data.validation and data.test"
        )
    if config.select_on == "validation" and len(data.validation) == 0:
        raise DataError(
            f"{data.origin}: no validation images are left to select the best epoch on; give each "
            "class at least two images, raise data.validation, or take select_on test"
        )
    if data.test_count == 0:
        raise DataError(f"{data.origin}: there are no test images; raise data.test above 0")
    _ = data.test  # decoded now, as a broken image is better found before the training than after
    for option, values in {"mean": wanted.mean, "std": wanted.std}.items():
        if values is not None and len(values) != data.channels:
            raise UsageError(f"data.{option} needs {data.channels} values, got {len(values)}")
    return data


def warn_of_data(data: ImageData, config: TrainConfig) -> None:
    """Warn of duplicates, of small classes unless a limit made them so, and of single labels."""
    small = []
    if config.data.limit is None:
        small = describe_small_classes(data, config.select_on == "validation")
    single = []
    if config.task == MULTILABEL and bool((data.train.labels.sum(dim=1) == 1).all()):
        single.append(
            f"{data.origin}: every training image has one class, as the task classification takes "
            "it; for several, give data.labels FILE, or link an image into the folder of each class"
        )
    for sentence in (*data.duplicates(), *small, *single):
        warnings.warn(sentence, SmallfryWarning, stacklevel=4)
