"""Training recipes of the studies: the paper's on CIFAR, the defaults elsewhere."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from smallfry.studies.config import RunsConfig
from smallfry.studies.study_models import StudyModel
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

PAPER_DATA = ("cifar10", "cifar100")
BATCH_SIZES = (64, 128, 256, 512, 1024)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's, for both data sets


class Planned(NamedTuple):
    """Planned run of a study."""

    name: str  # of its folder; no two runs of a study share it
    facts: Mapping[str, Any]  # what the study varies, and the seed
    config: TrainConfig


def paper_recipe(entry: StudyModel, data: str, batch_size: int) -> TrainConfig:
    """Build the recipe of arXiv 2603.19503, with the epoch chosen on held-out training images.

    One learning rate for all models and batch sizes, as there. ViTRM trains for 1000 epochs with
    averaged weights, all others for 300 without.
    """
    recursive = entry.recursive
    return TrainConfig(
        data=DataConfig(data, mean=list(MEAN), std=list(STD)),
        model=ModelConfig(
            entry.model,
            latent_steps=3 if recursive else None,
            recursion_steps=1 if recursive else None,
            drop_rate=0.1 if recursive else None,
            options=dict(entry.options),
        ),
        augment=AugmentConfig(crop_padding=4, flip=True, randaugment_ops=2, mixup=0.2, cutmix=1.0),
        objective=ObjectiveConfig("deep_supervision" if recursive else "cross_entropy"),
        optimizer=OptimizerConfig("adamw", 3e-4, 0.05, decay="all", betas=(0.9, 0.999), clip=None),
        schedule=ScheduleConfig(30.0 if recursive else 10.0, 1e-6, "epoch"),
        ema=EMAConfig(0.999 if recursive else 0.0, warmup=False),
        epochs=1000 if recursive else 300,
        batch_size=batch_size,
    )


def default_recipe(entry: StudyModel, data: str, batch_size: int) -> TrainConfig:
    """Build the settings of ``smallfry train``, the same for every model."""
    model = ModelConfig(entry.model, options=dict(entry.options))
    return TrainConfig(data=DataConfig(data), model=model, batch_size=batch_size)


def recipe(entry: StudyModel, runs: RunsConfig, batch_size: int, seed: int = 0) -> TrainConfig:
    """Build the training configuration of one run.

    Other epochs than the recipe's shorten its warm-up in proportion.
    """
    data = runs.data
    known = data.name in PAPER_DATA
    base = (paper_recipe if known else default_recipe)(entry, data.name, batch_size)
    epochs = runs.epochs or base.epochs
    warmup = base.schedule.warmup_epochs
    if warmup is not None:
        warmup *= epochs / base.epochs
    if data.mean is None:
        data = replace(data, mean=base.data.mean, std=base.data.std)
    return replace(
        base,
        data=data,
        schedule=replace(base.schedule, warmup_epochs=warmup),
        epochs=epochs,
        select_on=runs.select_on,
        seed=seed,
        device=runs.device,
        precision=runs.precision or base.precision,
        compile=runs.compile,
        threads=runs.threads,
        references=False,
        progress="quiet",
    )
