"""Write recipes/paper and recipes/short; ``make recipes``.

One file for each model, data set and batch size of the paper, all from
``smallfry.studies.recipes``, and three runs of minutes on one GPU.
"""

from dataclasses import replace
from pathlib import Path

import yaml

from smallfry.studies.recipes import BATCH_SIZES, PAPER_DATA, paper_recipe
from smallfry.studies.reported_vision import ACCURACY, DATA
from smallfry.studies.study_models import PAPER, STUDY_MODELS, StudyModel
from smallfry.training.config import (
    AugmentConfig,
    EMAConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

HERE = Path(__file__).parent
SECTIONS = ("data", "model", "augment", "objective", "optimizer", "schedule", "ema")
SETTINGS = ("epochs", "batch_size", "select_on", "precision")
LEFT_OUT = (
    *("test", "split_seed", "skip_unreadable", "init", "checkpoint_gradients"),
    "label_smoothing",
)

# Epochs that take about equally long: in inverse proportion to multiply-accumulates an image
# (1,454, 947 and 557 million), which is a guess until it has been timed on a GPU.
SHORT_EPOCHS = {"vitrm_small": 30, "cct_7_3x1": 46, "resnet18_cifar": 78}
RATES = {"vitrm_small": 5e-4, "cct_7_3x1": 7.5e-4}  # AdamW's: 0.192 over the width


def recipes() -> dict[str, str]:
    """The text of every recipe, by its path under this folder."""
    texts = {
        f"paper/{name}_{data}_b{size}.yaml": paper_text(name, data, size)
        for name in PAPER
        for data in PAPER_DATA
        for size in BATCH_SIZES
    }
    return texts | {f"short/{name}_cifar10.yaml": short_text(name) for name in SHORT_EPOCHS}


def paper_text(name: str, data: str, size: int) -> str:
    """A recipe of arXiv 2603.19503, with what is reported for it."""
    entry, figure = STUDY_MODELS[name], ACCURACY[data][name][size]
    reported = "out of memory" if figure is None else f"{figure:g} % (best test epoch of one run)"
    config = paper_recipe(entry, data, size)
    return _text(
        f"paper/{name}_{data}_b{size}.yaml",
        f"{entry.label} on {DATA[data]} with batches of {size}: the recipe of arXiv 2603.19503.\n"
        f"Reported there: {reported}. Here 10 % of the training images choose the\n"
        "epoch and the test split is read once; --select_on test --data.validation 0 is the\n"
        "paper's protocol, which flatters.",
        config,
    )


def short_config(name: str) -> TrainConfig:
    """CIFAR-10 in minutes of one GPU; all three have the same augmentation and schedule."""
    entry = STUDY_MODELS[name]
    optimizer = OptimizerConfig(lr=RATES.get(name))
    if name.startswith("resnet"):
        optimizer = OptimizerConfig("sgd", 0.1, 5e-4, clip=None)
    paper = paper_recipe(entry, "cifar10", 128)
    return replace(
        paper,
        model=ModelConfig(entry.model, **_recursion(entry)),
        augment=AugmentConfig(crop_padding=4, flip=True, mixup=0.0, cutmix=0.0),
        optimizer=optimizer,
        schedule=ScheduleConfig(2.0),
        ema=EMAConfig(0.999),
        epochs=SHORT_EPOCHS[name],
        precision="bf16-mixed",
    )


def short_text(name: str) -> str:
    """A recipe of minutes."""
    return _text(
        f"short/{name}_cifar10.yaml",
        f"{STUDY_MODELS[name].label} on CIFAR-10 in minutes of one GPU. The recipes of this folder "
        "differ in model,\noptimizer and epochs; these are meant to take equally long: in inverse "
        "proportion to the\narithmetic of an image, not yet timed on a GPU. Set --epochs if yours "
        "does not agree.",
        short_config(name),
    )


def _recursion(entry: StudyModel) -> dict[str, int]:
    return {"latent_steps": 3, "recursion_steps": 1} if entry.recursive else {}


def _text(path: str, about: str, config: TrainConfig) -> str:
    told = config.to_dict()
    said = {
        section: {
            key: value
            for key, value in told[section].items()
            if key == "clip" or (value not in (None, {}, []) and key not in LEFT_OUT)
        }
        for section in SECTIONS
    }
    if config.objective.name == "cross_entropy":
        said["objective"] = {"name": "cross_entropy"}
    said |= {key: told[key] for key in SETTINGS}
    lines = [f"# {line}" for line in about.splitlines()]
    lines += ["#", f"#   smallfry train --config recipes/{path} [--data.root DIR]"]
    body = yaml.safe_dump(said, sort_keys=False, default_flow_style=None)
    return "\n".join(lines) + "\n" + body


def write() -> None:
    """Write all recipes; others in their folders are removed."""
    texts = recipes()
    for folder in ("paper", "short"):
        (HERE / folder).mkdir(exist_ok=True)
        for file in (HERE / folder).glob("*.yaml"):
            if f"{folder}/{file.name}" not in texts:
                file.unlink()
    for path, text in texts.items():
        (HERE / path).write_text(text)


if __name__ == "__main__":
    write()
