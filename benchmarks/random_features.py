"""Random features in place of a dense layer or a head: MLP 64-256-256-10 on scikit-learn's digits.

    nice -n 5 python benchmarks/random_features.py --out results/random_features.json

The dense network is trained with AdamW at 2e-3 and a cosine (30 epochs, batch 64; 1,438 images to
train, 359 to test). "layer": its second layer of 256 × 256 with its ReLU becomes SNNK with m
features, started from the weights. "head": both of its last layers are bundled, fitted in closed
form to their outputs. Each is tested at once and after 10 epochs more of the same training. Counts
of parameters are those of the replaced layers; projections, which follow from a seed, are not in
them, but in the memory of a running model, and are named beside them.
"""

import argparse
import copy
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry import compress
from smallfry.layers.random_features import SNNKLinear
from smallfry.training.provenance import provenance

TRAINED, BATCH, RATE = 1438, 64, 2e-3
FEATURES = (16, 32, 64, 80, 128, 256)


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return the pixels in [0, 1], (images, 64), and labels, in an order of the seed."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train in place."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-TRAINED // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(TRAINED, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the test accuracy in per cent."""
    right = model(images[TRAINED:]).argmax(1) == labels[TRAINED:]
    return 100 * float(right.float().mean())


def replaced(model: nn.Sequential, form: str, features: int, images: Tensor) -> nn.Sequential:
    """Replace a part of a copy of the network."""
    small = copy.deepcopy(model)
    if form == "layer":
        assert isinstance(small[2], nn.Linear)
        small[2], small[3] = SNNKLinear.from_dense(small[2], features=features), nn.Identity()
        return small
    settings = compress.SNNK(features, include=("4",))
    some = images[:TRAINED]
    found, _ = compress.apply_to_model(small, [settings], example=some[:2], batches=[some])
    assert isinstance(found, nn.Sequential)
    return found


def measure(seed: int) -> dict[str, Any]:
    """Train a dense network, and replace parts of it."""
    images, labels = digits(seed)
    torch.manual_seed(seed)
    sizes = pairwise((64, 256, 256, 10))
    layers = [part for a, b in sizes for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    train(model, images, labels, 30, seed)
    counts = {"layer": 256 * 257, "head": 256 * 257 + 257 * 10}
    found: dict[str, Any] = {"dense": {"accuracy": accuracy(model, images, labels)}}
    longer = train(copy.deepcopy(model), images, labels, 10, seed)
    found["dense"]["tuned"] = accuracy(longer, images, labels)
    for form in ("layer", "head"):
        for features in FEATURES:
            small = replaced(model, form, features, images)
            (layer,) = [each for each in small if isinstance(each, SNNKLinear)]
            before = accuracy(small, images, labels)
            train(small, images, labels, 10, seed)
            own = sum(p.numel() for p in layer.parameters())
            found[f"{form}/{features}"] = {
                "accuracy": before,
                "tuned": accuracy(small, images, labels),
                "parameters": own,
                "projection": layer.projection.numel(),
                "saving": counts[form] / own,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = {}
    for seed in given.seeds:
        runs[seed] = measure(seed)
        print(f"seed {seed} done", flush=True)
    for name in runs[given.seeds[0]]:
        rows = [run[name] for run in runs.values()]
        means = [statistics.mean(row[key] for row in rows) for key in ("accuracy", "tuned")]
        saving = rows[0].get("saving", 1.0)
        print(f"{name}: {means[0]:.2f} %, tuned {means[1]:.2f} %, {saving:.1f} × fewer parameters")
    record = {"runs": runs, "provenance": provenance(torch.device("cpu"))}
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
