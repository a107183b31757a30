"""Accuracy and savings of fewer latent tokens, cross-attention and early exit.

    python benchmarks/thrift.py --out results/thrift.json --picture docs/pictures/digits_thrift.png
    python benchmarks/thrift.py --data cifar10 --root DIR --limit 4000 --tested 2000 --epochs 4

ViTRM micro on scikit-learn's digits, or a ViTRM of width 96 on some images of CIFAR-10, trained
with deep supervision over four recursion steps, in several forms. Each is tested with exit
thresholds that spend so many steps on validation images on average, and with the one that loses at
most 0.3 points there. All points of a form are of the same weights; the record and the picture hold
means over the seeds.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from smallfry import cost
from smallfry.data import load_data
from smallfry.report.figure import COLOURS, GREY, new_figure, save, style
from smallfry.training.config import DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from smallfry.training.evaluation import predict, score
from smallfry.training.exit_calibration import trace
from smallfry.training.provenance import provenance
from smallfry.training.run import load_run
from smallfry.training.train import train
from smallfry_runtime.early_exit import most_thrifty, operating_points

STEPS = 4


class Study(NamedTuple):
    """Data set with the variants of its model."""

    data: str
    model: str
    sizes: dict[str, Any]
    input_shape: tuple[int, int, int]
    precision: str
    forms: dict[str, dict[str, Any]]


STUDIES = {
    "digits": Study(
        "digits",
        "vitrm_micro_patch4_8",
        {},
        (1, 8, 8),
        "32-true",
        {
            "as in the paper": {},
            "1 latent token": {"latents": 1},
            "cross-attention": {"cross_attention": True},
            "cross-attention, 1 latent token": {"cross_attention": True, "latents": 1},
        },
    ),
    "cifar10": Study(
        "cifar10",
        "vitrm_tiny_patch4_32",
        {"embed_dim": 96, "num_heads": 3, "mlp_hidden_dim": 128},
        (3, 32, 32),
        "bf16-mixed",
        {
            "as in the paper": {},
            "16 latent tokens": {"latents": 16},
            "cross-attention, 16 latent tokens": {"cross_attention": True, "latents": 16},
        },
    ),
}
BUDGETS = [1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0]  # recursion steps an image, on average
DROP = 0.003  # of validation accuracy, that calibrated thresholds may cost


def curve(
    study: Study,
    source: DataConfig,
    tested: int | None,
    options: dict[str, Any],
    seed: int,
    epochs: int,
) -> list[dict[str, float]]:
    """Train one variant; measure MACs and test accuracy by budget, then calibrated."""
    options = study.sizes | options
    data = load_data(source.name, source.root, limit=source.limit, validation=source.validation)
    validation, test = (
        split.take(torch.arange(len(split))[:tested]) for split in (data.validation, data.test)
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(
            TrainConfig(
                data=source,
                model=ModelConfig(study.model, recursion_steps=STEPS, options=options),
                objective=ObjectiveConfig(supervision_steps=STEPS, halt_threshold=0.9),
                epochs=epochs,
                threads=1,
                precision=study.precision,
                seed=seed,
                references=False,
                run=run,
                progress="quiet",
            )
        )
        trained = load_run(run, "best")
    points = operating_points(trace(trained.model, validation, trained.normalize))
    chosen = [max((p for p in points if p.steps <= b), key=lambda p: p.steps) for b in BUDGETS]
    chosen.append(most_thrifty(points, DROP))
    found = []
    for point in chosen:
        measured = score(
            predict(trained.model, test, trained.normalize, exit_threshold=point.threshold)
        )
        steps = measured["recursion_steps"]
        found.append(
            {
                "threshold": point.threshold,
                "steps": steps,
                "macs": macs(study, options, steps),
                "validation_accuracy": point.accuracy,
                "test_accuracy": measured["accuracy"],
            }
        )
    return found


def macs(study: Study, options: dict[str, Any], steps: float) -> float:
    """Compute the MACs of some recursion steps; all after the first cost the same."""
    one, two = (
        cost(
            timm.create_model(study.model, recursion_steps=number, **options),
            torch.zeros(1, *study.input_shape),
        ).macs
        for number in (1, 2)
    )
    return one + (steps - 1) * (two - one)


def mean_over_seeds(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    return [
        {key: statistics.mean(point[key] for point in points) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def draw(study: Study, curves: dict[str, list[dict[str, float]]], file: Path) -> None:
    with style():
        figure = new_figure(7, 4.2)
        axes = figure.subplots()
        for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
            *line, calibrated = [(p["macs"] / 1e6, 100 * p["test_accuracy"]) for p in points]
            axes.plot(*zip(*line, strict=True), marker=".", color=colour, label=name)
            axes.plot(*calibrated, marker="*", markersize=14, color=colour)
        axes.plot([], [], "*", color=GREY, label=f"calibrated to lose at most {DROP:.1%}")
        axes.set_xlabel("average multiply-accumulates an image, millions")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(
            f"{study.data}: early exit from {STEPS} recursion steps, forms of a small ViTRM"
        )
        axes.legend()
        save(figure, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=sorted(STUDIES), default="digits")
    parser.add_argument(
        "--root", type=Path, help="Folder of the data set's files; default the hub."
    )
    parser.add_argument("--limit", type=int, help="Training images; default all.")
    parser.add_argument("--tested", type=int, help="Validation and test images; default all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    study, curves = STUDIES[arguments.data], {}
    held = 0.1 if arguments.limit is None else 0.04
    source = DataConfig(study.data, root=arguments.root, limit=arguments.limit, validation=held)
    for name, options in study.forms.items():
        runs = [
            curve(study, source, arguments.tested, options, seed, arguments.epochs)
            for seed in arguments.seeds
        ]
        curves[name] = mean_over_seeds(runs)
        print(name)
        for point in curves[name]:
            print(
                f"  {point['steps']:5.2f} steps {point['macs'] / 1e6:6.2f} MMAC "
                f"{point['test_accuracy']:7.2%} (validation {point['validation_accuracy']:.2%})",
                flush=True,
            )
    if arguments.picture is not None:
        draw(study, curves, arguments.picture)
    if arguments.out is not None:
        settings = {
            key: getattr(arguments, key) for key in ("data", "limit", "tested", "seeds", "epochs")
        }
        record = {"measured": settings | curves, "provenance": provenance(torch.device("cpu"))}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
