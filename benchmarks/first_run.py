"""Default settings of a first run against a plain loop of AdamW.

    python benchmarks/first_run.py --root DIR --out results/first_run.json
    python benchmarks/first_run.py --root DIR --out OUT --models resnet18 --data mnist --epochs 12

DIR has the folders mnist, cifar10 and olivetti. Five models of timm from random weights, on 1,500
images of MNIST, 5,000 of CIFAR-10, the Olivetti faces and scikit-learn's digits. "smallfry" is
``smallfry.train`` with the data, the model, the epochs and the seed, and nothing else. "plain" is
ten lines: AdamW at 1e-3, batches of 64, no augmentation, the last epoch. Both train on the same
images and are tested on the same; what is in the record already is left out. ``--only plain`` runs
one of the two.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch.nn import functional as F

import smallfry
from smallfry.training.augment import Normalize
from smallfry.training.checkpoint import write_file
from smallfry.training.config import DataConfig, ModelConfig
from smallfry.training.evaluation_data import load_config_data
from smallfry.training.provenance import provenance

MODELS = (
    "mobilenetv3_small_100",
    "resnet18",
    "efficientnet_lite0",
    "convnext_atto",
    "vit_tiny_patch16_224",
)
IN_PATCHES = {"vit_tiny_patch16_224": {"patch_size": 4}}  # 16 pixels would be half an image
DATA: dict[str, dict[str, Any]] = {  # timm's models halve the side five times: 32 pixels
    "mnist": {"name": "mnist", "limit": 1500, "validation": 0.01, "image_size": 32},
    "cifar10": {"name": "cifar10", "limit": 5000, "validation": 0.01},
    "olivetti": {"name": "olivetti", "image_size": 32},
    "digits": {"name": "digits", "image_size": 32},
}
EPOCHS = (3, 12, 50)


class Cell(NamedTuple):
    """One comparison."""

    data: str
    model: str
    epochs: int
    seed: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def data_config(name: str, root: Path) -> DataConfig:
    """Return the settings of a data set below a folder."""
    settings = dict(DATA[name])
    if name == "olivetti":
        settings["name"] = str(root / name)
    elif name != "digits":
        settings["root"] = root / name
    return DataConfig(**settings)


def train_plainly(cell: Cell, root: Path, rate: float = 1e-3) -> float:
    """Train with AdamW and nothing else, and return the test accuracy after the last epoch."""
    data = load_config_data(data_config(cell.data, root))
    normalize = Normalize(data.mean, data.std)
    torch.manual_seed(cell.seed)
    model = build(cell.model, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    images, labels = normalize(data.train.images), data.train.labels
    for _ in range(cell.epochs):
        model.train()
        for rows in torch.randperm(len(labels)).split(64):
            if len(rows) > 1:  # batch norm
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    model.eval()
    with torch.inference_mode():
        tested = zip(data.test.images.split(256), data.test.labels.split(256), strict=True)
        right = sum(int((model(normalize(x)).argmax(1) == y).sum()) for x, y in tested)
    return right / len(data.test)


def build(name: str, data: Any) -> torch.nn.Module:
    """Build a model for the images and classes of a data set."""
    sizes = {"img_size": data.image_size} if name.startswith("vit") else {}
    options = sizes | options_for(name, data.image_size)
    return timm.create_model(name, num_classes=len(data.classes), in_chans=data.channels, **options)


def options_for(name: str, size: int) -> dict[str, Any]:
    """Return the options of a model for images of a size."""
    return {key: min(value, size // 4) for key, value in IN_PATCHES.get(name, {}).items()}


def train_with_defaults(cell: Cell, root: Path, changes: dict[str, Any]) -> float:
    """Train with smallfry's defaults, and return the test accuracy."""
    data = data_config(cell.data, root)
    size = load_config_data(data).image_size
    model = ModelConfig(name=cell.model, options=options_for(cell.model, size))
    with tempfile.TemporaryDirectory() as folder:
        run = smallfry.train(
            data=data,
            model=model,
            epochs=cell.epochs,
            seed=cell.seed,
            run=Path(folder) / "run",
            references=False,
            progress="quiet",
            **changes,
        )
    return float(run["measured"]["test"]["accuracy"])


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    """List the comparisons, the cheap ones first."""
    for seed in given.seeds:
        for epochs in given.epochs:
            for data in given.data:
                for model in given.models:
                    yield Cell(data, model, epochs, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="has mnist, cifar10, olivetti")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--data", nargs="+", default=["digits", "olivetti", "mnist", "cifar10"])
    parser.add_argument("--epochs", nargs="+", type=int, default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--changes", type=json.loads, default={}, help="settings of smallfry's, as JSON"
    )
    parser.add_argument("--only", choices=("plain", "smallfry"), help="default both")
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(given.out.read_text()) if given.out.exists() else {}
    measured = record.setdefault("measured", {})
    for cell in cells(given):
        found = measured.get(str(cell), {})
        missing = [n for n in ("plain", "smallfry") if n not in found and given.only in (None, n)]
        for name in missing:
            began = time.process_time()
            if name == "plain":
                found[name] = train_plainly(cell, given.root)
            else:
                found[name] = train_with_defaults(cell, given.root, given.changes)
            found[f"{name} seconds"] = round(time.process_time() - began, 1)
            record.setdefault("provenance", {})[name] = provenance(torch.device("cpu"))
            measured[str(cell)] = found
            write_file(given.out, json.dumps(record, indent=1) + "\n")
        if missing:
            print(cell, {k: round(v, 4) for k, v in found.items()}, flush=True)
    report({name: found for name, found in measured.items() if len(found) == 4})


def report(measured: dict[str, Any]) -> None:
    """Print the differences in points, by data and epochs."""
    gains: dict[tuple[str, str], list[float]] = {}
    for name, found in measured.items():
        data, _, epochs, _ = name.split("/")
        gains.setdefault((data, epochs), []).append(100 * (found["smallfry"] - found["plain"]))
    for (data, epochs), some in gains.items():
        print(
            f"{data}, {epochs} epochs: {statistics.mean(some):+.1f}, least {min(some):+.1f} points"
        )


if __name__ == "__main__":
    main()
