"""Refit the scaling rule for ViTRM on digits: width, recursion and resolution.

    python benchmarks/scaling_rule.py --out results/scaling_rule.jsonl

Each line of the file is a trained network, so a stopped run continues. The rule is fitted twice:
for a budget of multiply-accumulates, and for one at fixed width, that is at fixed parameters.
Patches have 2 pixels, images are resized.
"""

import argparse
import json
import tempfile
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import timm
import torch

import smallfry
from smallfry.errors import SmallfryWarning
from smallfry.search import Sample, fit_scaling_rule
from smallfry.training.config import DataConfig, EMAConfig, ModelConfig, TrainConfig
from smallfry.training.train import train

WIDTHS, LATENT_STEPS, SIDES = (32, 48, 64, 96), (1, 2, 3, 6), (6, 8, 12)
CHOSEN = 72  # of all combinations and two seeds, at random
EPOCHS = 12
BUDGETS = (1e6, 3e6, 10e6)


def options(width: float, recursion: float) -> dict:
    """Arguments of ViTRM: heads of 16 features, and a hidden layer as wide as the paper's."""
    dim = 16 * max(1, round(width / 16))
    sizes = {"embed_dim": dim, "num_heads": dim // 16, "mlp_hidden_dim": dim * 4 // 3}
    return sizes | {"latent_steps": max(1, round(recursion)), "patch_size": 2}


def macs(settings: dict) -> float:
    """Measured multiply-accumulates of an image."""
    side = 2 * max(1, round(settings["resolution"] / 2))
    with torch.device("meta"):
        model = timm.create_model(
            "vitrm_micro_patch4_8",
            img_size=side,
            in_chans=1,
            **options(settings["width"], settings["recursion"]),
        )
        return smallfry.cost(model, torch.zeros(1, 1, side, side)).macs


def accuracy(settings: dict, seed: int) -> float:
    """Train a network, and return its test accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        model = options(settings["width"], settings["recursion"])
        steps = model.pop("latent_steps")
        summary = train(
            TrainConfig(
                data=DataConfig(image_size=int(settings["resolution"])),
                model=ModelConfig("vitrm_micro_patch4_8", latent_steps=steps, options=model),
                ema=EMAConfig(0.99),
                epochs=EPOCHS,
                seed=seed,
                threads=1,
                references=False,
                run=Path(folder) / "run",
                progress="quiet",
            )
        )
    return float(summary["measured"]["test"]["accuracy"])


def plan() -> list[tuple[dict, int]]:
    """List the networks to train, in a fixed random order."""
    every = list(product(WIDTHS, LATENT_STEPS, SIDES, (0, 1)))
    order = np.random.default_rng(0).permutation(len(every))[:CHOSEN]
    return [
        ({"width": w, "recursion": n, "resolution": r}, seed)
        for w, n, r, seed in (every[i] for i in order)
    ]


def read(out: Path) -> list[dict]:
    """Networks trained so far."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def report(rows: list[dict]) -> None:
    """Print both rules at some budgets."""
    samples = [Sample(row["settings"], row["macs"], row["accuracy"]) for row in rows]
    rule = fit_scaling_rule(samples, axes=("resolution", "recursion"))
    for width in (None, *WIDTHS):
        some = [s for s in samples if width in (None, s.settings["width"])]
        if len(some) < 8:
            continue
        if width is not None:
            rule = fit_scaling_rule(some, axes=("resolution",), remainder="recursion")
        print("budget of MACs" if width is None else f"width {width}")
        for budget in BUDGETS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SmallfryWarning)
                found = rule(budget)
            print(f"  {budget / 1e6:g} MMAC: {found.settings} ± {found.deviations}")


def main() -> None:
    """Train what is missing, and fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/scaling_rule.jsonl"))
    parser.add_argument("--most", type=int, default=CHOSEN, help="networks to train in all")
    given = parser.parse_args()
    done = len(read(given.out))
    for settings, seed in plan()[done : given.most]:
        row = {
            "settings": settings,
            "seed": seed,
            "macs": macs(settings),
            "accuracy": accuracy(settings, seed),
            "epochs": EPOCHS,
        }
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if len(read(given.out)) >= 10:
        report(read(given.out))


if __name__ == "__main__":
    main()
