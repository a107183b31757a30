"""Sparse training and robust sparsity of an MLP 64-256-256-10 on scikit-learn's digits.

    nice -n 5 python benchmarks/sparse_digits.py --out results/sparse_digits.json

RigL at 90 % beside dense training and static random masks: test accuracy, three seeds. Magnitude
pruning to 90 % in adversarial training (PGD, eps 0.1, three steps) with and without the penalties
of robust sparsity: test accuracy, accuracy under PGD-20 of the same eps, and the median log of the
condition numbers of the matrices, five seeds. AdamW at 2e-3 with a cosine, batch 64; 1,438 images
to train, 359 to test.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry import compress
from smallfry.compress.sparse.robust import log_condition
from smallfry.training.attack import PGD
from smallfry.training.augment import Normalize
from smallfry.training.method import Running, Setting
from smallfry.training.provenance import provenance
from smallfry.transforms import ModelSpec

TRAINED, BATCH, EPS = 1438, 64, 0.1
PLAIN = Normalize((0.0,), (1.0,))
SPARSE = {
    "dense": [],
    "static random masks": [compress.RigL(0.9, alpha=0.0, ends=True)],
    "RigL": [compress.RigL(0.9, every=25, ends=True)],
}
PRUNING = compress.GradualMagnitude(0.9, ends=True)
ROBUST = {
    "magnitude pruning": [PRUNING],
    "with penalties": [
        compress.TransformedL1(ends=True),
        compress.ConditionNumber(ends=True),
        PRUNING,
    ],
}


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return the images in [0, 1], (images, 1, 8, 8), and labels, in an order of the seed."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    return images, torch.tensor(labels)[order]


def mlp(seed: int) -> nn.Sequential:
    """Build the network."""
    torch.manual_seed(seed)
    sizes = pairwise((64, 256, 256, 10))
    layers = [part for a, b in sizes for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer."""
    return torch.optim.AdamW(model.parameters(), 2e-3)


def trained(
    model: nn.Module,
    methods: Sequence[Any],
    seed: int,
    epochs: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    attack: PGD | None = None,
    spec: ModelSpec | None = None,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Train with methods, and return the finished model with the test images and labels."""
    images, labels = digits(seed)
    steps, whole = epochs * (TRAINED // BATCH), TRAINED // BATCH * BATCH
    setting = Setting(spec or ModelSpec("mlp"), images[:2], (), steps, seed)
    running = Running(methods, model, setting)
    inner = optimizer(model)
    running.attach(inner)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(inner, steps + 1)
    random = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(TRAINED, generator=random)[:whole].split(BATCH):
            inputs, targets = images[rows], labels[rows]
            if attack is not None:
                inputs = attacked(model, attack, inputs, targets, random)
            inner.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            running.add_penalty()
            running.observe(loss.detach)
            inner.step()
            scheduler.step()
    running.finish()
    return model.eval(), images[TRAINED:], labels[TRAINED:]


def attacked(
    model: nn.Module, attack: PGD, images: Tensor, labels: Tensor, random: torch.Generator
) -> Tensor:
    """Change images to mislead a model."""
    return attack(images, lambda x: F.cross_entropy(model(x), labels), PLAIN, random)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def condition(model: nn.Module) -> float:
    """Return the median log condition number of the matrices."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return statistics.median(float(log_condition(weight.detach())) for weight in weights)


def robust(methods: Sequence[Any], seed: int) -> dict[str, float]:
    """Train against the attack, and measure accuracy, accuracy under attack and condition."""
    model, images, labels = trained(mlp(seed), methods, seed, 12, attack=PGD(EPS, steps=3))
    random = torch.Generator().manual_seed(1000 + seed)
    worse = attacked(model, PGD(EPS, steps=20), images, labels, random)
    return {
        "accuracy": accuracy(model, images, labels),
        "under_attack": accuracy(model, worse, labels),
        "log_condition": condition(model),
    }


def main() -> int:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/sparse_digits.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        name: [accuracy(*trained(mlp(seed), methods, seed, 40)) for seed in range(3)]
        for name, methods in SPARSE.items()
    }
    found |= {
        name: [robust(methods, seed) for seed in range(5)] for name, methods in ROBUST.items()
    }
    found["provenance"] = provenance(torch.device("cpu"))
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "provenance"}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
