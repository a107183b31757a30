"""Gated residual and highway networks beside plain ones of equal parameters.

    python benchmarks/gated_mlp.py --out results/gated_mlp.json [--root DIR]

Digits and diabetes of scikit-learn; MNIST (6,000 training images) with --root. Each network is
trained by AdamW for the same number of steps at the best of three learning rates on a validation
part, and tested once; the table has mean and standard deviation over seeds.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.models.gated_mlp import GatedMLP

RATES, STEPS, BATCH, WIDTH = (1e-3, 3e-3, 1e-2), 300, 64, 32


class Table(NamedTuple):
    """Data set; targets are classes, or standardised numbers."""

    inputs: Tensor
    targets: Tensor
    classes: int  # 0 for regression


def tables(root: Path | None) -> dict[str, Table]:
    """Load the data sets."""
    digits, labels = load_digits(return_X_y=True)
    diabetes, score = load_diabetes(return_X_y=True)
    found = {
        "digits": Table(torch.tensor(digits / 16).float(), torch.tensor(labels), 10),
        "diabetes": Table(
            torch.tensor(diabetes / diabetes.std(0)).float(),
            torch.tensor((score - score.mean()) / score.std()).float(),
            0,
        ),
    }
    if root is not None:
        from smallfry.data import load_data

        split = load_data("mnist", root, limit=8000).train
        images = split.images.flatten(1).float() / 255
        found["mnist"] = Table(images, split.labels, 10)
    return found


def networks(features: int, outputs: int) -> dict[str, nn.Module]:
    """Build the networks; the plain ones are as wide as their parameters allow."""
    gated = {
        kind: GatedMLP(1, features, outputs, WIDTH, depth=2, kind=kind)
        for kind in ("grn", "highway")
    }
    built: dict[str, nn.Module] = {}
    for kind, net in gated.items():
        budget = count(net)
        width = max(w for w in range(4, 512) if size_of_plain(features, w, outputs) <= budget)
        built |= {kind: net, f"plain, as {kind}": plain(features, width, outputs)}
    return built


def size_of_plain(features: int, width: int, outputs: int) -> int:
    """Count the parameters of ``plain``."""
    return (features + 1) * width + (width + 1) * width + (width + 1) * outputs


def plain(features: int, width: int, outputs: int) -> nn.Module:
    """Build a network of two hidden layers."""
    layers = (features, width), (width, width)
    hidden = [m for sizes in layers for m in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, outputs))


def count(net: nn.Module) -> int:
    """Count parameters."""
    return sum(p.numel() for p in net.parameters())


def loss_of(out: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Cross-entropy, or mean squared error."""
    return F.cross_entropy(out, targets) if classes else F.mse_loss(out[:, 0], targets)


def fitted(table: Table, kind: str, seed: int, rate: float) -> tuple[float, float, int]:
    """Train one network; validation and test score (accuracy, or mean squared error) and size."""
    torch.manual_seed(seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(table.inputs)))
    train, validation, test = order.tensor_split([int(0.6 * len(order)), int(0.8 * len(order))])
    net = networks(table.inputs.shape[1], table.classes or 1)[kind]
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    inputs = table.inputs[:, :, None, None]
    for _ in range(STEPS):
        some = train[torch.randint(len(train), (BATCH,))]
        loss = loss_of(net(inputs[some]), table.targets[some], table.classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    scores = []
    with torch.inference_mode():
        for part in (validation, test):
            out, targets = net(inputs[part]), table.targets[part]
            right = (out.argmax(1) == targets).float().mean() if table.classes else None
            scores.append(float(loss_of(out, targets, 0) if right is None else right))
    return scores[0], scores[1], count(net)


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="folder with mnist")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    rows = []
    for name, table in tables(given.root).items():
        for kind in ("grn", "plain, as grn", "highway", "plain, as highway"):
            chosen = []
            for seed in range(given.seeds):
                tried = [fitted(table, kind, seed, rate) for rate in RATES]
                best = max if table.classes else min
                chosen.append(best(tried))
            scores = [test for _, test, _ in chosen]
            rows.append(
                {
                    "data": name,
                    "network": kind,
                    "parameters": chosen[0][2],
                    "score": "accuracy" if table.classes else "mean squared error",
                    "mean": round(mean(scores), 4),
                    "deviation": round(stdev(scores), 4),
                    "seeds": given.seeds,
                }
            )
            print(rows[-1], flush=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
