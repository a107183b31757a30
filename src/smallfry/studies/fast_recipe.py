"""Fast recipe of the study at equal time, for any model and data set.

That of ``recipes/fast``, with the rates of LoopNet's sizes as they are there. The rates of other
models are common ones and were not tuned: momentum SGD for convolutional networks, AdamW for those
with attention.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from smallfry.studies.config import ParetoConfig
from smallfry.studies.study_models import StudyModel
from smallfry.training.config import (
    AugmentConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

MOMENTUM = {"momentum": 0.85}  # timm's SGD is Nesterov's
WARMUP = 10  # one part in so many of the epochs


class Rates(NamedTuple):
    """Settings of the recipe by model."""

    optimizer: str
    lr: float
    weight_decay: float
    bias_rate: float = 1.0
    batch_size: int = 512
    label_smoothing: float = 0.1
    crop_padding: int = 2
    cutout: int = 8
    ema: float = 0.98
    precision: str = "bf16-mixed"


SMALL: dict[str, Any] = {"label_smoothing": 0.0, "crop_padding": 4, "cutout": 0}  # that underfit
RATES = {  # by the beginning of the model's name, the first that fits
    "loopnet_70k": Rates("sgd", 1.0, 5e-4, 4.0, 1024, ema=0.99, **SMALL),
    "loopnet_300k": Rates("sgd", 0.5, 8e-4, 16.0, 512, 0.05, 4, 4, 0.99),
    "loopnet": Rates("sgd", 0.75, 1.3e-3, 16.0),
    "vitrm": Rates("adamw", 5e-4, 0.05, batch_size=128),
    "cct": Rates("adamw", 1.5e-3, 0.05, batch_size=128),
    "paper_vit": Rates("adamw", 5e-4, 0.05, batch_size=128),
    "vit": Rates("adamw", 5e-4, 0.05, batch_size=128),
    "resnet8": Rates("sgd", 0.5, 5e-4, **SMALL),
    "resnet20": Rates("sgd", 0.5, 5e-4, 1.0, 512, 0.05, 4, 4),
    "simplenet_cifar_310k": Rates("sgd", 0.5, 5e-4, 1.0, 512, 0.05, 4, 4),
    "resnet18": Rates("sgd", 0.2, 5e-4, batch_size=128),
    # depthwise convolutions take many times as long in bfloat16 on a CPU
    "mobilenet": Rates("sgd", 0.5, 5e-4, precision="32-true"),
}
OTHERS = Rates("sgd", 0.5, 1e-3)
ABOUT_32 = ("cifar10", "cifar100", "mnist", "fashion_mnist")  # pixels


def rates_of(entry: StudyModel) -> Rates:
    """Return the rates for a model."""
    return next((r for start, r in RATES.items() if entry.model.startswith(start)), OTHERS)


def fast_recipe(entry: StudyModel, config: ParetoConfig, epochs: int, seed: int) -> TrainConfig:
    """Build the training configuration of one run at equal time.

    Crops, cutout and flips at the test are those of ``recipes/fast`` on the named data sets with
    images of about 32 pixels; elsewhere crops have the default of ``smallfry train``.

    Args:
        entry: The model.
        config: The study's settings; ``threads`` are set.
        epochs: Epochs, of which a tenth are warm-up.
        seed: Seed of the run.
    """
    rates = rates_of(entry)
    sgd = rates.optimizer == "sgd"
    augment = AugmentConfig(border="reflect", flips="alternating", mixup=0.0, cutmix=0.0)
    sized = config.data.name in ABOUT_32
    if sized:
        augment = replace(augment, crop_padding=rates.crop_padding, cutout=rates.cutout)
    return TrainConfig(
        data=config.data,
        model=ModelConfig(entry.model, options=dict(entry.options)),
        augment=augment,
        objective=ObjectiveConfig(
            "deep_supervision" if entry.recursive else "cross_entropy",
            label_smoothing=0.0 if entry.recursive else rates.label_smoothing,
        ),
        optimizer=OptimizerConfig(
            rates.optimizer,
            rates.lr,
            rates.weight_decay,
            bias_rate=rates.bias_rate,
            clip=None if sgd else 1.0,
            options=dict(MOMENTUM) if sgd else {},
        ),
        schedule=ScheduleConfig(epochs / WARMUP, 0.0, shape="linear"),
        ema=EMAConfig(rates.ema),
        epochs=epochs,
        batch_size=rates.batch_size,
        select_on=config.select_on,
        seed=seed,
        device=config.device,
        precision=config.precision or rates.precision,
        compile=config.compile,
        channels_last=sgd,
        test_flips=config.data.name.startswith("cifar"),
        threads=config.threads,
        references=False,
        progress="quiet",
    )
