"""Evaluation data of a trained model: its own, known by fingerprint, or other data."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from smallfry.data import ImageData, Split, is_named, load_data
from smallfry.data.duplicates import image_hashes
from smallfry.data.named import NO_ROOT
from smallfry.data.sources import shard_files
from smallfry.errors import (
    AccessError,
    DataError,
    RunError,
    SmallfryError,
    SmallfryWarning,
    UsageError,
)
from smallfry.training.config import MULTILABEL, DataConfig, read_config
from smallfry.training.run import RunFolder, TrainedModel
from smallfry_runtime.names import path_of, text_of


def load_like(
    trained: TrainedModel,
    run: str | Path,
    name: str | None = None,
    root: Path | None = None,
    split: str = "test",
) -> tuple[ImageData, Split, str]:
    """Load a data set in the form that a trained model takes, and one split of it.

    Images are brought to the model's size, labels to the order of its classes.

    Returns:
        The data set, the split, and its name. For a test split that the data does not have, it is
        the validation split, or "all" if there is none either.

    Args:
        trained: The model.
        run: Its run folder, whose data is taken if ``name`` is None.
        name: A data set or folder. If it is the data that the model was trained on, wherever that
            is now, it is split as it was then. Other data is never divided.
        root: Folder of a named data set.
        split: train, validation or test.

    Raises:
        UsageError: No data is named, neither here nor by the run.
        DataError: The data can't be used, or the split is empty.
    """
    folder = RunFolder(path_of(str(run)))
    is_run = folder.config.is_file()
    before = _sized(read_config(folder.config).data, trained) if is_run else None
    if name is None:
        data = _data_of_the_run(trained, folder, before, root, split)
    else:
        data = _named_data(trained, folder, before, name, root, split)
    data = data.relabelled(trained.classes)
    if split == "test":
        return data, *_for_testing(data)
    chosen: Split = getattr(data, split)
    if len(chosen) == 0:
        raise DataError(f"{data.origin}: its {split} split is empty")
    return data, chosen, split


def _for_testing(data: ImageData) -> tuple[Split, str]:
    """Return the images that a model is tested on, with the name of their split."""
    if data.test_count:
        return data.test, "test"
    if len(data.validation):
        return data.validation, "validation"
    return data.train, "all"


def _warn_of_other_tests(data: ImageData, folder: RunFolder, split: str) -> None:
    """Warn if a run's own data has another test split than the run was tested on."""
    if split != "test" or not data.test_count:
        return
    with suppress(RunError):  # of a damaged summary
        known = ((folder.read_summary() or {}).get("data") or {}).get(TEST_FINGERPRINT)
        if known not in (None, data.test_fingerprint):
            warnings.warn(
                f"{data.origin}: its test split has changed since the run was tested, so the "
                "scores can't be compared with those of its summary",
                SmallfryWarning,
                stacklevel=4,
            )


TEST_FINGERPRINT = "test_fingerprint"  # entry of summaries
OF_LABELS = ("labels", "image_column", "split_column", "label_columns", "label_separator")


def load_config_data(wanted: DataConfig, min_classes: int = 2) -> ImageData:
    """Load the data set of a configuration."""
    given = {field.name: getattr(wanted, field.name) for field in fields(wanted)}
    name, root, _, _ = (given.pop(key) for key in ("name", "root", "mean", "std"))
    given["resize"] = given["resize"] or "crop"
    return load_data(name, root, min_classes=min_classes, **given)


def require_place(wanted: DataConfig, remedy: str) -> None:
    """Require that a run's data folder is still in place.

    Raises:
        DataError: It is not; the message ends with ``remedy``.
    """
    folder = path_of(wanted.name)
    if not is_named(wanted.name) and folder.is_absolute() and not folder.is_dir():
        raise DataError(f"{folder}: the run's data is missing; {remedy}")


def _data_of_the_run(
    trained: TrainedModel,
    folder: RunFolder,
    before: DataConfig | None,
    root: Path | None,
    split: str,
) -> ImageData:
    if before is None:
        raise UsageError(f"{folder.path}: the location of its data is not recorded; give --data")
    require_place(before, "if it was moved, name its new place: --data FOLDER")
    data = load_config_data(before if root is None else replace(before, root=root))
    if not data.matches(trained.manifest["data"]["fingerprint"]):
        warnings.warn(
            f"{data.origin}: has changed since the training; its {split} split may hold images "
            "that the model was trained on",
            SmallfryWarning,
            stacklevel=3,
        )
    else:
        _warn_of_other_tests(data, folder, split)
    return data


def _named_data(
    trained: TrainedModel,
    folder: RunFolder,
    before: DataConfig | None,
    name: str,
    root: Path | None,
    split: str,
) -> ImageData:
    if before is not None and root is None and name == before.name:
        root = before.root
    own = _its_own_data(trained, before, name, root)
    if own is not None:
        _warn_of_other_tests(own, folder, split)
        return own
    if before is not None and _is_same_place(name, before.name):
        return _data_of_the_run(trained, folder, before, root, split)
    told = trained.manifest["data"].get("splits")
    form = DataConfig(**told) if before is None and told is not None else before
    label = None if form is None else form.label
    several = trained.manifest.get("task") == MULTILABEL
    other = DataConfig(name, root, validation=0.0, test=0.0, label=label, several_labels=several)
    if form is not None and form.labels is not None and (path_of(name) / form.labels).is_file():
        columns = {key: getattr(form, key) for key in OF_LABELS}
        other = replace(other, **columns)
    elif form is not None and form.image_column is not None and _has_tables(path_of(name)):
        other = replace(other, image_column=form.image_column)
    data = load_config_data(_sized(other, trained), min_classes=1)
    if split == "test":
        _warn_of_training_images(data, before)
    return data


def _its_own_data(
    trained: TrainedModel, before: DataConfig | None, name: str, root: Path | None
) -> ImageData | None:
    """Load a model's own training data with its splits; None for other data."""
    known = trained.manifest["data"]
    if before is None and "splits" not in known:
        return None
    wanted = replace(before or DataConfig(**known["splits"]), name=name, root=root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            data = load_config_data(_sized(wanted, trained))
        except AccessError:
            raise
        except SmallfryError:  # settings of the run that are none for this data
            return None
    if not data.matches(known["fingerprint"]):
        return None
    for each in caught:
        warnings.warn(each.message, stacklevel=4)
    return data


def _sized(wanted: DataConfig, trained: TrainedModel) -> DataConfig:
    """Adapt a configuration to the model's image size."""
    if trained.bit_depth is not None:
        wanted = replace(wanted, bit_depth=trained.bit_depth)
    return replace(
        wanted,
        image_size=trained.frame.plain,
        resize=trained.resize,
        channels=trained.channels,
    )


def _has_tables(folder: Path) -> bool:
    return folder.is_dir() and bool(shard_files(folder))


def _is_same_place(name: str, other: str) -> bool:
    if is_named(name) or is_named(other):
        return name == other
    one, two = path_of(name), path_of(other)
    return one.exists() and two.exists() and one.samefile(two)


def _warn_of_training_images(data: ImageData, before: DataConfig | None) -> None:
    """Warn if test data contain training images, as far as those are available."""
    chosen, _ = _for_testing(data)
    if before is None or not (before.name in NO_ROOT or path_of(before.name).is_dir()):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained_on = load_config_data(before).train
    except SmallfryError:
        return
    if not isinstance(trained_on.pixels, Tensor) or not isinstance(chosen.pixels, Tensor):
        return
    hashes = image_hashes(chosen.pixels, chosen.rows)
    known = np.isin(hashes, image_hashes(trained_on.pixels, trained_on.rows))
    if known.any():
        warnings.warn(
            f"{data.origin}: {known.sum():,} of its {len(known):,} images are among those that "
            "the model was trained on, so the scores are too optimistic",
            SmallfryWarning,
            stacklevel=4,
        )


def require_same_data(manifest: Mapping[str, Any], data: ImageData, folder: RunFolder) -> None:
    """Require the data that a checkpoint was trained on.

    Raises:
        DataError: It is other data.
    """
    trained_on = manifest["data"]["fingerprint"]
    classes = list(map(text_of, manifest["classes"]))
    if classes != list(data.classes) or not data.matches(trained_on):
        raise DataError(
            f"{folder.path}: was trained on other data than {data.origin} gives now (fingerprint "
            f"{trained_on}, now {data.fingerprint}); bring that data back, or start a new run"
        )
