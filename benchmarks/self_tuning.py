"""Compare self-tuning with a random grid at equal total steps, on digits.

    python benchmarks/self_tuning.py --out results/self_tuning.json

An MLP 64-128-10 on 597 images, 600 to validate and 600 to test; SGD with momentum, rate 0.05, half
a cosine. One run of 9,000 steps tunes dropout, noise, decay, smoothing and augmentation;
the grid is 30 random points of the same ranges with 300 steps each, of which the lowest validation
loss is taken; *untuned* is a run of 9,000 steps with the tuned run's first values.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.io.json_lines import JsonLines
from smallfry.io.replace import write_whole
from smallfry.search.tables.digits import Digits, Split, load_split
from smallfry.tasks import Batch
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.hyper_parameters import TUNABLE, Hyper, from_unconstrained
from smallfry.training.objective import Supervised
from smallfry.training.self_tuning import SelfTuned

STEPS, POINTS, BATCH, RATE, SEEDS = 9000, 30, 64, 0.05, (0, 1, 2)
NEVER = 10**9


class Network(nn.Module):
    """MLP with dropout of the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.0), nn.Linear(128, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def batch_of(split: Split, rows: Tensor) -> Batch:
    labels = split.labels[rows]
    return Batch(split.images[rows], ClassTargets(labels, F.one_hot(labels, 10).float()))


@torch.no_grad()
def score(model: nn.Module, split: Split) -> dict[str, float]:
    model.eval()
    logits = model(split.images)
    model.train()
    accuracy = (logits.argmax(1) == split.labels).float().mean()
    return {"loss": F.cross_entropy(logits, split.labels).item(), "accuracy": accuracy.item()}


def train(
    digits: Digits, hypers: list[Hyper], steps: int, seed: int, tunes: bool
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Network()
    count = len(digits.validation.labels)

    def validation(step: int) -> Batch:
        generator = torch.Generator().manual_seed(10_000 * seed + step)
        return batch_of(digits.validation, torch.randperm(count, generator=generator)[:256])

    warmup = 50 if tunes else NEVER
    tuned = SelfTuned(Supervised(Classification()), hypers, validation, warmup, seed)
    tuned.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(digits.train.labels), (BATCH,), generator=generator)
        loss = next(iter(tuned(model, batch_of(digits.train, rows)))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        "steps": steps,
        "validation": score(model, digits.validation),
        "test": score(model, digits.test),
        "values": tuned.values,
        "seconds": round(time.process_time() - began, 1),
        "history": tuned.history[::20] if tunes else [],
    }


def random_point(generator: np.random.Generator) -> list[Hyper]:
    """Draw hyper-parameters uniformly in their ranges, weight decay by its logarithm."""
    found = []
    for hyper in TUNABLE.values():
        unit = float(generator.uniform(0.001, 0.999))
        number = math.log(unit / (1 - unit))
        start = from_unconstrained(number, hyper.low, hyper.high, hyper.log)
        found.append(Hyper(hyper.name, start, hyper.low, hyper.high, hyper.log))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    digits, lines = load_split(), JsonLines(given.out.with_suffix(".jsonl"))
    known = {(line["seed"], line["name"], line.get("point")) for line in lines.read()}
    for seed in SEEDS:
        generator = np.random.default_rng(seed)
        points = [random_point(generator) for _ in range(POINTS)]
        jobs: list[tuple[Any, ...]] = [
            ("grid", number, point, STEPS // POINTS, False) for number, point in enumerate(points)
        ]
        jobs += [("untuned", None, list(TUNABLE.values()), STEPS, False)]
        jobs += [("tuned", None, list(TUNABLE.values()), STEPS, True)]
        for name, point, hypers, steps, tunes in jobs:
            if (seed, name, point) not in known:
                found = train(digits, hypers, steps, seed, tunes)
                lines.append({"seed": seed, "name": name, "point": point, **found})
                print(seed, name, point, found["validation"], found["seconds"], flush=True)
    runs = lines.read()
    results: dict[str, Any] = {}
    for name in ("tuned", "grid", "untuned"):
        for seed in SEEDS:
            of = [run for run in runs if run["name"] == name and run["seed"] == seed]
            best = min(of, key=lambda run: run["validation"]["loss"])
            best = {key: best[key] for key in ("validation", "test", "values")}
            results.setdefault(name, []).append(
                {"seed": seed, **best, "cpu_seconds": round(sum(run["seconds"] for run in of), 1)}
            )
    summary = {
        "command": "python benchmarks/self_tuning.py",
        "data": "scikit-learn digits, real: 597 to train, 600 to validate, 600 to test",
        "model": "MLP 64-128-10",
        "total_steps": STEPS,
        "grid_points": POINTS,
        "results": results,
    }
    write_whole(given.out, (json.dumps(summary, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
