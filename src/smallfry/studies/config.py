"""Settings of the studies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from smallfry.training.config import DataConfig


@dataclass(frozen=True)
class RaceConfig:
    """Settings of an optimizer race.

    Args:
        problem: curves, mnist, faces, deep_linear, deep_linear_plain or convnet.
        root: Folder of the data; not needed for curves.
        contestants: Optimizers to race; default all.
        seconds: Training time of each full run.
        seeds: Full runs of each contestant with the tuned, and with the default settings.
        tuning_trials: Settings tried for each contestant; 0 races the defaults only.
        tuning_seconds: Training time of each trial.
        fisher_seconds: Time to measure Fisher errors; 0 skips them.
        processes: Number of parallel trials; default one per core, 1 on a GPU.
        threads: CPU threads of each trial.
        device: Device, such as cpu or cuda.
    """

    problem: str = "curves"
    root: Path | None = None
    contestants: tuple[str, ...] | None = None
    seconds: float = 40.0
    seeds: int = 3
    tuning_trials: int = 8
    tuning_seconds: float = 10.0
    fisher_seconds: float = 60.0
    processes: int | None = None
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class RunsConfig:
    """Common settings of all studies of training runs.

    Args:
        data: The data set.
        epochs: Epochs of every run; default the recipe's, on CIFAR the paper's 1000 and 300.
        seeds: Number of runs of each kind, with seeds 0, 1, ...
        select_on: Split that chooses the best epoch; test is the paper's protocol, biased upwards
            (with data.validation 0 it trains on all training images, as in the paper).
        device: auto, cpu, cuda or mps.
        precision: Lightning Fabric's precision, such as bf16-mixed; default 32-true, and the fast
            recipe's at equal time.
        compile: Compile the training step.
        threads: CPU threads; default that of smallfry train, and PyTorch's at equal time.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig("cifar10"))
    epochs: int | None = None
    seeds: int = 1
    select_on: Literal["validation", "test"] = "validation"
    device: str = "auto"
    precision: str | None = None
    compile: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class BatchSizeConfig(RunsConfig):
    """Models by batch sizes.

    Args:
        models: Names of the study's models, or of timm's; default the paper's.
        batch_sizes: Batch sizes.
    """

    models: tuple[str, ...] = (
        "vitrm_small",
        "vit_small",
        "vit_base",
        "vit_large",
        "resnet18",
        "resnet34",
        "resnet50",
    )
    batch_sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class RecursionConfig(RunsConfig):
    """Recursion steps of a ViTRM.

    Args:
        vitrm: The ViTRM to study.
        latent_steps: Latent steps per recursion step (n).
        supervision_steps: Recursion steps per batch in training (N_sup).
        recursion_steps: Recursion steps at inference (T). All except the first are tried with the
            middle n only.
        batch_size: Images per step.
    """

    vitrm: str = "vitrm_small"
    latent_steps: tuple[int, ...] = (1, 2, 3, 6, 12)
    supervision_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    recursion_steps: tuple[int, ...] = (1, 2, 4)
    batch_size: int = 128


@dataclass(frozen=True)
class OptimizersConfig(RunsConfig):
    """ViTRM trained by several optimizers.

    Args:
        vitrm: The ViTRM to study.
        optimizers: Optimizers to compare; default adamw, muon and all of natural gradient.
        lr_factors: Multiples of each optimizer's usual learning rate; the epoch and the rate are
            chosen on the same split.
        batch_size: Images per step.
    """

    vitrm: str = "vitrm_small"
    optimizers: tuple[str, ...] | None = None
    lr_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    batch_size: int = 128


@dataclass(frozen=True)
class ParetoConfig(RunsConfig):
    """Accuracy against cost.

    Args:
        models: Names of the study's models, or of timm's; default those of the papers, and at
            equal time the small ones. With ``finished``: names of its runs, default all.
        minutes: Train each model as long, by the fast recipe: minutes of ``threads`` cores, from
            which epochs follow by a measured speed; ``epochs`` and ``batch_size`` are not used.
        finished: Folder of runs that have ended, NAME-seedN, to report on without training.
        speed_seconds: CPU seconds to measure a model's speed, at equal time.
        batch_size: Images per training step.
        latency_rounds: Timed images of each model; the models take turns.
        latency_threads: CPU threads of the timed models.
    """

    models: tuple[str, ...] | None = None
    minutes: float | None = None
    finished: Path | None = None
    speed_seconds: float = 10.0
    batch_size: int = 128
    latency_rounds: int = 50
    latency_threads: int = 1


def _on_digits(epochs: int, **settings: object) -> Mapping[str, Any]:
    return {"data.name": "digits", "epochs": epochs, **settings}


RACE_SHORT: Mapping[str, Any] = {
    "seconds": 4.0,
    "seeds": 1,
    "tuning_trials": 2,
    "tuning_seconds": 2.0,
    "fisher_seconds": 8,
}


@dataclass(frozen=True)
class StudyKind:
    """Type of a study.

    Args:
        purpose: Line in the help.
        config: Class of its settings.
        defaults: Settings that differ from the defaults of the class.
        short: Settings of the short form.
    """

    purpose: str
    config: type
    defaults: Mapping[str, Any]
    short: Mapping[str, Any]


STUDIES = {
    "autoencoder": StudyKind(
        "Race optimizers on auto-encoders (arXiv 2201.10285).",
        RaceConfig,
        {"problem": "curves"},
        RACE_SHORT,
    ),
    "two-level": StudyKind(
        "Race coarse spaces of two-level KFAC (arXiv 2303.18083).",
        RaceConfig,
        {"problem": "deep_linear"},
        RACE_SHORT,
    ),
    "batch-size": StudyKind(
        "Train the models of arXiv 2603.19503 with its batch sizes.",
        BatchSizeConfig,
        {},
        _on_digits(
            20,
            models=("vitrm_micro", "vit_micro", "cct_micro", "resnet_micro"),
            batch_sizes=(16, 64, 256),
        ),
    ),
    "recursion": StudyKind(
        "Train a ViTRM with more and less recursion (n, N_sup, T).",
        RecursionConfig,
        {},
        _on_digits(
            6,
            vitrm="vitrm_micro",
            latent_steps=(1, 3, 6),
            supervision_steps=(1, 2, 4),
            recursion_steps=(1, 2),
            batch_size=64,
        ),
    ),
    "optimizer": StudyKind(
        "Train a ViTRM with AdamW, Muon and natural gradient.",
        OptimizersConfig,
        {},
        _on_digits(6, vitrm="vitrm_micro", lr_factors=(1.0, 3.0), batch_size=64),
    ),
    "pareto": StudyKind(
        "Compare accuracy with parameters, MACs and latency, after equal epochs or equal time.",
        ParetoConfig,
        {},
        _on_digits(
            20,
            seeds=2,
            models=("vitrm_micro", "vitrm_micro_thrifty", "vit_micro", "cct_micro", "resnet_micro"),
            batch_size=64,
        ),
    ),
}
