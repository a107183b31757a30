"""Factorisation to half of the linear layers' parameters: SVD, tensor trains, curvature.

    nice -n 5 python benchmarks/factorise.py digits --out results/factorise.json
    nice -n 5 python benchmarks/factorise.py cifar10 --root DIR --out results/factorise.json
    nice -n 5 python benchmarks/factorise.py run --runs runs/cct_2 --out results/factorise.json

``digits``: a ViT of two blocks (64 features, 16 patches) on scikit-learn's digits, three seeds:
1,438 images to train, shifted by up to a pixel, 359 to test; AdamW at 2e-3, one cycle, 100 epochs.
All linear layers of the blocks are factorised, then trained for another five epochs ("healed") at a
tenth of the rate, as the dense network is, too. 256 training images calibrate.

``cifar10``: the trained networks of results/models, whose 3 × 3 convolutions are factorised as
matrices, on the first test images and without training.

``run``: trained runs, by ``smallfry compress`` and ``smallfry evaluate``. The linear layers of the
blocks are factorised, then trained for another three epochs at a tenth of the rate, as the dense
network is, too. New runs are beside the given one.

With ``--picture FILE`` it draws the sensitivity profile of the first seed instead, by the SVD in
the metric of the curvature, with the shares that are chosen:

    python benchmarks/factorise.py digits --seeds 0 --picture docs/pictures/factorise_profile.png

Accuracy and divergence from the dense network, mean KL in nats, are of the test images. The file is
written after every figure, and what is in it is not measured again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import smallfry
from smallfry.compress import LowRank, TensorTrain, apply_to_model
from smallfry.data import load_data
from smallfry.report.compression import draw_profile
from smallfry.training.calibration import CalibrationBatches
from smallfry.training.config import read_config
from smallfry.training.evaluation import forward
from smallfry.training.method import to_dict
from smallfry.training.provenance import provenance

MODELS = Path(__file__).parents[1] / "results" / "models"
TRAINED, CALIBRATED, BATCH, RATE = 1438, 256, 32, 2e-3
EPOCHS, HEALING = 100, 5
TUNING = 3  # epochs after the factorisation of a run
BLOCKS = ("blocks.*",)
PICTURED = "SVD, curvature, shares by divergence"
STEM = ("stem", "head")  # small ones stay dense


def contestants(keep: float, trains: bool, **given: Any) -> dict[str, Any]:
    """List the factorisations to the same share of parameters."""
    methods: dict[str, Any] = {}
    for allocation in ("uniform", "divergence"):
        end = "" if allocation == "uniform" else ", shares by divergence"
        shared = {"keep": keep, "allocation": allocation, **given}
        methods[f"SVD{end}"] = LowRank(**shared)
        methods[f"SVD, curvature{end}"] = LowRank(**shared, metric="curvature")
        if trains:
            methods[f"tensor train{end}"] = TensorTrain(**shared)
    return methods


def compared(dense: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute accuracy in percent and divergence from the dense network."""
    before, after = (each.double().log_softmax(1) for each in (dense, logits))
    divergence = (before.exp() * (before - after)).sum(1).mean().item()
    accuracy = (after.argmax(1) == labels).double().mean().item()
    return {"accuracy": round(100 * accuracy, 2), "divergence": float(f"{divergence:.3g}")}


class Record:
    """Figures by part, seed or model, and contestant, in a file."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._all: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}

    def missing(self, part: str, key: str) -> bool:
        """Return whether a figure is still to be measured."""
        return key not in self._all.get(part, {})

    def note(self, part: str, key: str, figures: Mapping[str, Any]) -> None:
        """Record figures, print them and write the file."""
        self._all.setdefault(part, {})[key] = figures
        self._all["provenance"] = provenance(torch.device("cpu"))
        self._out.write_text(json.dumps(self._all, indent=1) + "\n")
        print(part, key, {k: v for k, v in figures.items() if k != "layers"}, flush=True)


def vit(seed: int) -> nn.Module:
    """Build the network for digits."""
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}
    end = {"num_classes": 10, "class_token": False, "global_pool": "avg"}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", in_chans=1, **sizes, **end)
    return model


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, seed: int) -> None:
    """Train in place, with the order of images and their shifts that the seed gives."""
    images, labels = data
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            down, across = torch.randint(3, (2,), generator=generator).tolist()
            shifted = padded[rows, :, down : down + 8, across : across + 8]
            optimizer.zero_grad()
            F.cross_entropy(model(shifted), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


class Trained(NamedTuple):
    """Network for digits, and their images and labels, those to train first."""

    model: nn.Module
    images: Tensor
    labels: Tensor


def trained_on_digits(seed: int) -> Trained:
    """Train a network, on images in the order that the seed gives."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    images = ((torch.tensor(pixels, dtype=torch.float32) - 4.9) / 6)[order].view(-1, 1, 8, 8)
    labels = torch.tensor(classes)[order]
    model = vit(seed)
    train(model, (images[:TRAINED], labels[:TRAINED]), EPOCHS, RATE, seed)
    return Trained(model, images, labels)


def picture(seed: int, keep: float, file: Path) -> None:
    """Draw the sensitivity profile of a network."""
    model, images, _ = trained_on_digits(seed)
    method = contestants(keep, trains=False, include=BLOCKS)[PICTURED]
    reports: list[dict[str, Any]] = []
    apply_to_model(model, [method], batches=images[:CALIBRATED].split(64), reports=reports)
    draw_profile(reports[0]["profile"], file)


def digits(record: Record, seed: int, keep: float) -> None:
    """Train, factorise and heal with one seed."""
    part = f"digits, {keep:g} of the parameters, seed {seed}"
    methods = contestants(keep, trains=True, include=BLOCKS)
    if not any(record.missing(part, key) for key in ("dense", *methods)):
        return
    model, images, labels = trained_on_digits(seed)
    given, wanted = (images[:TRAINED], labels[:TRAINED]), labels[TRAINED:]

    @torch.no_grad()
    def logits(network: nn.Module) -> Tensor:
        return network(images[TRAINED:])  # type: ignore[no-any-return]

    dense = logits(model)
    for key, method in ({"dense": None} | methods).items():
        if not record.missing(part, key):
            continue
        small, reports = deepcopy(model), list[dict[str, Any]]()
        if method is not None:
            batches = images[:CALIBRATED].split(64)
            small, _ = apply_to_model(model, [method], batches=batches, reports=reports)
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in small.parameters()),
            "before": compared(dense, logits(small), wanted),
        }
        train(small, given, HEALING, RATE / 10, seed + 1)
        figures["healed"] = compared(dense, logits(small), wanted)
        figures["layers"] = reports[0]["layers"] if reports else []
        record.note(part, key, figures)


def cifar10(record: Record, name: str, keep: float, root: Path, count: int) -> None:
    """Factorise a trained network of CIFAR-10."""
    part = f"{name}, {keep:g} of the parameters, {count} images"
    trained = smallfry.load(MODELS / name)
    data = load_data("cifar10", root, limit=2560)
    batches = CalibrationBatches(data.train, trained.normalize, trained.model)
    test = data.test.take(torch.arange(count))

    @torch.no_grad()
    def logits(network: nn.Module) -> Tensor:
        parts = (trained.normalize(each) for each in test.images.split(250))
        return torch.cat([forward(network, each)[0] for each in parts])

    dense = logits(trained.model)
    for key, method in ({"dense": None} | contestants(keep, trains=False, exclude=STEM)).items():
        if record.missing(part, key):
            small, reports = trained.model, list[dict[str, Any]]()
            if method is not None:
                small, _ = apply_to_model(small, [method], batches=batches, reports=reports)
            figures = {
                "parameters": sum(p.numel() for p in small.parameters()),
                "before": compared(dense, logits(small), test.labels),
                "layers": reports[0]["layers"] if reports else [],
            }
            record.note(part, key, figures)


def call(*words: object) -> str:
    """Run a command of smallfry, and return what it prints."""
    command = [sys.executable, "-m", "smallfry", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluated(run: Path) -> dict[str, Any]:
    """Evaluate a run on its test images."""
    found: dict[str, Any] = json.loads(call("evaluate", run, "--json"))
    return {
        "accuracy": round(100 * found["accuracy"], 2),
        "loss": round(found["loss"], 4),
        "parameters": sum(p.numel() for p in smallfry.load(run).model.parameters()),
    }


def trained_run(record: Record, run: Path, keep: float) -> None:
    """Factorise and heal a trained run by the command line."""
    part = f"{run.name}, {keep:g} of the parameters"
    if record.missing(part, "dense"):
        further, rate = (
            run.with_name(f"{run.name}-further"),
            read_config(run / "config.yaml").optimizer.lr,
        )
        if not (further / "summary.json").exists():
            changes = f"--epochs {TUNING} --references false --progress quiet".split()
            changes += ["--model.start", str(run), "--optimizer.lr", str(rate / 10)]
            call("train", "--config", run / "config.yaml", *changes, "--run", further)
        record.note(part, "dense", {"before": evaluated(run), "healed": evaluated(further)})
    methods = contestants(keep, trains=True, include=BLOCKS)
    for number, (key, method) in enumerate(methods.items()):
        if not record.missing(part, key):
            continue
        figures: dict[str, Any] = {}
        for state, budget in {"before": (), "healed": ("--epochs", TUNING)}.items():
            small = run.with_name(f"{run.name}-{number}-{state}")
            if not (small / "compression.json").exists():
                given = json.dumps([to_dict(method)])
                call("compress", run, "--methods", given, "--to", small, *budget)
            figures[state] = evaluated(small)
        record.note(part, key, figures)


def main() -> int:
    """Measure what is missing in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["digits", "cifar10", "run"])
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--root", type=Path)
    parser.add_argument("--models", nargs="*", default=["loopnet_70k"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("results/factorise.json"))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.picture is not None:
        picture(arguments.seeds[0], arguments.keep, arguments.picture)
        return 0
    record = Record(arguments.out)
    if arguments.part == "digits":
        for seed in arguments.seeds:
            digits(record, seed, arguments.keep)
    elif arguments.part == "run":
        for run in arguments.runs:
            trained_run(record, run, arguments.keep)
    else:
        for name in arguments.models:
            cifar10(record, name, arguments.keep, arguments.root, arguments.images)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
