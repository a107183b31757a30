"""Compression with a fine-tuning budget: a training run from another model, with methods."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from smallfry.compress.pipeline import apply
from smallfry.data import ImageData
from smallfry.deploy.pretrained import save_pretrained
from smallfry.errors import UsageError, nearest
from smallfry.studies.speed import epochs_within, measure_epoch
from smallfry.training.compression import REPORTS
from smallfry.training.config import DataConfig, ModelConfig, TrainConfig, read_config
from smallfry.training.continuation import with_changes
from smallfry.training.distillation_config import DistillationConfig
from smallfry.training.method import MethodSettings
from smallfry.training.optimization import peak_learning_rate
from smallfry.training.run import RunFolder, TrainedModel
from smallfry.training.train import train
from smallfry_runtime.files import read_json

LOWER_RATE = 0.1  # of the peak learning rate that the model was trained with
MEASURED = 5.0  # seconds in which the time of an epoch is measured
BEGINNING = ".start"  # in the new run folder: the model after methods that act once
TAKEN = ("methods", "epochs", "run", "seed", "model", "distillation")  # settings of the command


def fine_tune(
    trained: TrainedModel,
    source: str,
    methods: Sequence[MethodSettings],
    config: TrainConfig,
    data: ImageData,
    minutes: float | None,
    reports: list[dict[str, Any]],
) -> dict[str, Any]:
    """Apply methods in a fine-tuning run.

    Methods at the front that act once, and leave something to train, are applied first; those that
    train act during the run, and the others at its end.

    Args:
        trained: The model before.
        source: The run or shared folder that it was loaded from.
        methods: In the order of their stages.
        config: As ``tuning_config`` gave it.
        data: To calibrate with.
        minutes: Budget of time instead of the configuration's epochs.
        reports: Filled with what the methods report.

    Returns:
        The summary of the run.
    """
    assert config.run is not None
    first, folder = _first(methods), RunFolder(config.run)
    folder.require_free()
    start = config.run / BEGINNING
    try:
        if first:
            small = apply(trained, methods[:first], data, config.seed, reports)
            start.parent.mkdir(parents=True, exist_ok=True)
            if RunFolder(Path(source)).config.is_file():
                small.save(start)
            else:
                save_pretrained(small, start)
            source = str(start)
        model = replace(config.model, start=source)
        config = replace(config, model=model, methods=list(methods[first:]))
        if minutes is not None:
            speed = measure_epoch(replace(config, run=None, progress="quiet"), MEASURED)
            config = replace(config, epochs=epochs_within(60 * minutes, speed))
        summary = train(config)
        file = folder.path / REPORTS
        if file.is_file():
            reports += read_json(file)
        return summary
    except BaseException:
        if first and not folder.config.exists():  # nothing to go on with
            shutil.rmtree(start, ignore_errors=True)
            with suppress(OSError):  # of other files, such as a lock
                start.parent.rmdir()
        raise


def tuning_config(
    trained: TrainedModel,
    run: str,
    place: Path,
    data: DataConfig | None,
    epochs: int,
    seed: int,
    distill: float,
    changes: Mapping[str, Any],
) -> TrainConfig:
    """Build the configuration of a fine-tuning run from that of the model.

    Args:
        trained: The model.
        run: Its run, of which the settings are taken, or a shared folder.
        place: New run folder.
        data: Data instead of the run's.
        epochs: Passes over the training images.
        seed: Random seed.
        distill: Weight of the model as its own teacher; 0 for none.
        changes: Settings by dotted name, over those of the model's training.

    Raises:
        UsageError: A setting that there isn't, or no data.
    """
    file = RunFolder(Path(run)).config
    known = read_config(file) if file.is_file() else None
    config = known or TrainConfig()
    _require_known(changes)
    if data is None and known is None:
        raise UsageError(f"{run}: the location of its data is not recorded; give --data")
    rate = LOWER_RATE * peak_learning_rate(config.optimizer, trained.model)
    schedule = config.schedule
    if schedule.shape == "steps":  # its milestones are those of another number of epochs
        schedule = replace(schedule, shape="cosine", milestones=[])
    config = replace(
        config,
        model=ModelConfig(start=run, checkpoint_gradients=config.model.checkpoint_gradients),
        data=_data(config.data if known else None, trained, data),
        optimizer=replace(config.optimizer, lr=rate),
        schedule=schedule,
        distillation=DistillationConfig(run if distill else None, distill or 0.5),
        epochs=epochs,
        patience=None,
        callbacks=[],  # code of the run's own, which is not here
        metrics=[],
        loggers=[],
        references=False,
        seed=seed,
        run=place,
        reported={},
    )
    return with_changes(config, changes)


def _first(methods: Sequence[MethodSettings]) -> int:
    """Count the methods at the front that are applied before the run."""
    count = 0
    for method in methods:
        if method.trains or not getattr(method, "tunable", False):
            break
        count += 1
    return count


def _data(own: DataConfig | None, trained: TrainedModel, other: DataConfig | None) -> DataConfig:
    """Return the data of the run, or other data split as the model's own were."""
    if other is None:
        assert own is not None
        return own
    if own is not None:
        return replace(own, name=other.name, root=other.root)
    splits = trained.manifest["data"].get("splits", {})
    names = {each.name for each in fields(DataConfig)}
    return DataConfig(
        **{
            **{key: value for key, value in splits.items() if key in names},
            "name": other.name,
            "root": other.root,
        }
    )


def _require_known(changes: Mapping[str, Any]) -> None:
    known = TrainConfig().to_dict()
    names = [
        f"{group}.{name}" if isinstance(value, dict) and value else group
        for group, value in known.items()
        for name in (value if isinstance(value, dict) and value else [""])
    ]
    for name in changes:
        if name not in names:
            raise UsageError(f"tuning has no setting '{name}'{nearest(name, names)}")
        if name.partition(".")[0] in TAKEN:
            raise UsageError(f"tuning.{name}: the command sets it; leave it out")
