"""Loss of natural gradient after 200 untuned steps on the MNIST auto-encoder.

    python benchmarks/descent.py --root DIR --out results/descent.json

784-1000-500-250-30-250-500-1000-784 with ReLU, batch 256, one seed, and each method at its own
defaults with lr 0.1; AdamW with its usual 1e-3. Nothing is tuned and one seed is one seed: this
shows whether defaults work at all, not which method is best. The loss is per pixel, on the batch.
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.data import load_data
from smallfry.optim import (
    EKFAC,
    KFAC,
    KPSVD,
    SNGD,
    Deflation,
    KFACCorrected,
    Lanczos,
    TwoLevel,
)
from smallfry.training.provenance import provenance

SHOWN = (10, 50, 100, 200)
METHODS: dict[str, Any] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
    "KFAC": lambda m: KFAC(m, 0.1, likelihood="bernoulli"),
    "KFAC, whole factors": lambda m: KFAC(m, 0.1, factor_rank=None, likelihood="bernoulli"),
    "KFAC, no burn-in": lambda m: KFAC(m, 0.1, burn_in=0, likelihood="bernoulli"),
    "EKFAC": lambda m: EKFAC(m, 0.1, likelihood="bernoulli"),
    "EKFAC, whole bases": lambda m: EKFAC(m, 0.1, factor_rank=None, likelihood="bernoulli"),
    "KPSVD": lambda m: KPSVD(m, 0.1, likelihood="bernoulli"),
    "Deflation": lambda m: Deflation(m, 0.1, likelihood="bernoulli"),
    "Lanczos": lambda m: Lanczos(m, 0.1, likelihood="bernoulli"),
    "KFAC-corrected": lambda m: KFACCorrected(m, 0.1, likelihood="bernoulli"),
    "Two-level": lambda m: TwoLevel(m, 0.1, likelihood="bernoulli"),
    "SNGD": lambda m: SNGD(m, 0.1, likelihood="bernoulli"),
}


def autoencoder() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([784, 1000, 500, 250, 30, 250, 500, 1000, 784]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def descend(name: str, images: Tensor) -> dict[str, float]:
    torch.manual_seed(0)
    model = autoencoder()
    optimizer = METHODS[name](model)
    losses, began = {}, time.perf_counter()
    for step in range(1, SHOWN[-1] + 1):
        batch = images[torch.randint(len(images), (256,))].flatten(1) / 255
        loss = F.binary_cross_entropy_with_logits(model(batch), batch, reduction="sum") / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in SHOWN:
            losses[str(step)] = loss.item() / 784
    return losses | {"seconds": time.perf_counter() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, help="Folder of MNIST's files; default the hub.")
    parser.add_argument("--out", type=Path, help="Write the figures as JSON.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = load_data("mnist", arguments.root, limit=12800).train.images
    found = {}
    for name in METHODS:
        found[name] = descend(name, images)
        shown = "  ".join(f"{found[name][str(step)]:9.4f}" for step in SHOWN)
        print(f"{name:20} {shown}  {found[name]['seconds']:6.1f} s", flush=True)
    if arguments.out is not None:
        record = {"measured": found, "provenance": provenance(torch.device("cpu"))}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
