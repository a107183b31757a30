"""Ablation of ViTRM-plus: variants of one model, trained for equal time.

    python benchmarks/plus.py alone --root DIR --device cuda --out results/plus_alone.json
    python benchmarks/plus.py alone --data digits --minutes 0.05   # to try it; decides nothing
    python benchmarks/plus.py alone --costs                        # parameters and MMAC alone

Each form is timed over three epochs first, then trained for as many as fit into ``--minutes``
(compilation apart), with a learning rate that ends there. What is on disk already is not done
again, and a run that was cut off goes on. Decide by validation accuracy, which is that of the last
epoch, as the best of many flatters those that have many; test accuracy, of the best epoch, is for
what has been decided. Stages:

    alone    each switch added to ViTRM
    without  the model that the names stand for, and each of its switches taken away
    recipe   that model with other optimizers, augmentation and supervision
"""

import argparse
import csv
import json
import statistics
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch

from smallfry import cost
from smallfry.models.vitrm_plus import CHOSEN
from smallfry.studies.optimizer import optimizer_settings
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.optimization import peak_learning_rate
from smallfry.training.provenance import provenance
from smallfry.training.run import RunFolder
from smallfry.training.train import resume, train

OFF = {
    "tokenizer": "patch",
    "depthwise": False,
    "positions": "learned",
    "injection": "concat",
    "pool": "y",
    "state_norm": "none",
    "layer_scale": 0.0,
}
ALONE: dict[str, dict[str, Any]] = {
    "ViTRM": {},
    "add": {"injection": "add"},
    "add, rms norm": {"injection": "add", "state_norm": "rms"},
    "conv tokenizer": {"tokenizer": "conv"},
    "depthwise": {"depthwise": True},
    "rotary": {"positions": "rotary"},
    "rotary and learned": {"positions": "both"},
    "pool z": {"pool": "z"},
    "pool both": {"pool": "both"},
    "rms norm": {"state_norm": "rms"},
    "layer norm": {"state_norm": "layer"},
    "layer scale": {"layer_scale": 0.1},
    "drop path": {"drop_path": 0.1},
    "random depth": {"random_depth": True},
}
RECIPES: dict[str, dict[str, Any]] = {
    "drop path": {"model": {"drop_path": 0.1}},
    "random depth": {"model": {"random_depth": True}},
    "dropout 0": {"drop_rate": 0.0},
    "muon": {"optimizer": OptimizerConfig("muon")},
    "muon, twice the rate": {"optimizer": OptimizerConfig("muon", lr=1e-3)},
    "kfac": {"natural": "kfac"},
    "stronger RandAugment": {"augment": {"randaugment_magnitude": 15}},
    "no RandAugment": {"augment": {"randaugment_ops": 0}},
    "label smoothing": {"objective": {"label_smoothing": 0.1}},
    "two steps": {"objective": {"supervision_steps": 2, "halt_threshold": 1.0}, "steps": 2},
}
STAGES: dict[str, dict[str, dict[str, Any]]] = {
    "alone": {name: {"model": OFF | switches} for name, switches in ALONE.items()},
    "without": {
        "all": {},
        **{f"without {name}": {"model": {name: OFF[name]}} for name in CHOSEN},
    },
    "recipe": {"all": {}, **{f"with {name}": change for name, change in RECIPES.items()}},
}
TIMED = 3  # epochs, of which the first compiles and the quicker of the others counts


def configure(
    arguments: argparse.Namespace, change: dict[str, Any], seed: int, epochs: int, run: Path
) -> TrainConfig:
    cifar = arguments.data == "cifar10"
    augment = {"crop_padding": 4, "flip": True, "randaugment_ops": 2} if cifar else {}
    return TrainConfig(
        data=DataConfig(arguments.data, root=arguments.root),
        model=ModelConfig(
            model_name(arguments),
            recursion_steps=change.get("steps", 1),
            drop_rate=change.get("drop_rate"),
            options=change.get("model", {}),
        ),
        augment=AugmentConfig(**augment | change.get("augment", {})),
        objective=ObjectiveConfig(**change.get("objective", {})),
        optimizer=optimizer(arguments, change),
        schedule=ScheduleConfig(warmup_epochs=epochs / 20),
        epochs=epochs,
        batch_size=256 if cifar else 64,
        seed=seed,
        device=arguments.device,
        precision="bf16-mixed" if cifar else "32-true",
        compile=arguments.device == "cuda",
        references=False,
        run=run,
        progress="quiet",
    )


def model_name(arguments: argparse.Namespace) -> str:
    default = "vitrm_plus_small_32" if arguments.data == "cifar10" else "vitrm_plus_micro_8"
    return str(arguments.model or default)


def optimizer(arguments: argparse.Namespace, change: dict[str, Any]) -> OptimizerConfig:
    """Build the optimizer of a variant; natural gradient as in the study of optimizers."""
    if "natural" not in change:
        return change.get("optimizer", OptimizerConfig())
    with torch.device("meta"):
        model = timm.create_model(model_name(arguments))
    adamw = OptimizerConfig(lr=peak_learning_rate(OptimizerConfig(), model))
    return optimizer_settings(change["natural"], 1.0, adamw)


def finished(config: TrainConfig) -> dict[str, Any]:
    """Return the summary of a run: existing, resumed or new."""
    assert config.run is not None
    file = RunFolder(config.run).config
    if not file.exists():
        return train(config)
    before, now = (replace(c, run=None).to_dict() for c in (read_config(file), config))
    before["data"]["root"] = now["data"]["root"] = None  # full on disk
    for key in now:
        if before[key] != now[key]:
            sys.exit(
                f"{config.run} was told {key} {before[key]}, not {now[key]}: take other --runs"
            )
    return resume(config.run)


def epochs_that_fit(config: TrainConfig, minutes: float) -> int:
    assert config.run is not None
    finished(config)
    rows = csv.DictReader(RunFolder(config.run).metrics.read_text().splitlines())
    took = min(b - a for a, b in pairwise(float(row["seconds"]) for row in rows))
    return max(1, round(60 * minutes / took))


def measure(arguments: argparse.Namespace, change: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one variant for each seed."""
    timing = configure(arguments, change, 0, TIMED, folder / "timing")
    epochs = epochs_that_fit(timing, arguments.minutes)
    found: dict[str, Any] = {"epochs": epochs, "validation": [], "test": [], "seconds": []}
    for seed in arguments.seeds:
        config = configure(arguments, change, seed, epochs, folder / f"seed{seed}-{epochs}")
        measured = finished(config)["measured"]
        rows = list(csv.DictReader(RunFolder(config.run).metrics.read_text().splitlines()))
        found["validation"].append(float(rows[-1]["validation_accuracy"]))  # of the last epoch
        found["test"].append(measured["test"]["accuracy"])
        found["seconds"].append(measured["training_seconds"])
        found |= {key: measured[key] for key in ("parameters", "macs")}
    return found


def costs(arguments: argparse.Namespace, change: dict[str, Any]) -> str:
    wanted = configure(arguments, change, 0, 1, arguments.runs).model
    model = timm.create_model(wanted.name, **wanted.arguments())
    spent = cost(model, torch.zeros(1, *model.input_shape))
    return f"{spent.parameters:>9,} parameters  {spent.macs / 1e6:7,.1f} MMAC"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=sorted(STAGES))
    parser.add_argument("--only", nargs="+", help="forms of the stage; default all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", choices=["cifar10", "digits"], default="cifar10")
    parser.add_argument("--root", type=Path, help="folder of the data set's files")
    parser.add_argument("--model", help="such as vitrm_plus_tiny_32; default by the data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/plus"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--costs", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    forms = STAGES[arguments.stage]
    unknown = set(arguments.only or ()) - set(forms)
    if unknown:
        parser.error(f"{arguments.stage} has no {', '.join(sorted(unknown))}; it has {[*forms]}")
    record: dict[str, Any] = {}
    for name in arguments.only or forms:
        if arguments.costs:
            print(f"{name:<24} {costs(arguments, forms[name])}")
            continue
        kind = Path(arguments.data, model_name(arguments), arguments.stage)
        folder = arguments.runs / kind / name.replace(", ", "-")
        record[name] = found = measure(arguments, forms[name], folder)
        accuracy = statistics.mean(found["validation"])
        reached = f"validation {accuracy:.2%}  {found['epochs']} epochs"
        print(f"{name:<24} {reached}  {costs(arguments, forms[name])}", flush=True)
        if arguments.out is not None:
            settings = {k: getattr(arguments, k) for k in ("stage", "minutes", "seeds", "data")}
            settings["model"] = model_name(arguments)
            evidence = provenance(torch.device(arguments.device))
            whole = {"measured": settings | {"forms": record}, "provenance": evidence}
            arguments.out.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
