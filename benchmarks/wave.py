"""Surrogates of the wave equation: a dense CNN beside a-priori CP convolutions.

    nice -n 5 python benchmarks/wave.py --out results/wave.json

Each predicts u(t + 4) from u(t − 1) and u(t), on data of ``smallfry.data.generators.wave``:
400 training pairs and 100 test pairs, each from a simulation of its own; the test pairs are the
same for all. The network is a convolution to 32 channels, two residual ones and one to the field,
5 × 5 all, added to u(t). Each convolution is of the field mirrored at the walls, as the solver's
own stencil is. ``cp`` has at most a fifth of each convolution's parameters, from the
start. Both are trained alike, each at two rates, of which the lower error on its training pairs
chooses. Runs that have ended are not repeated.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry import compress, cost
from smallfry.data.generators.wave import WavePairs, wave_pairs
from smallfry.report.figure import new_figure, save
from smallfry.training.provenance import provenance

CHANNELS, BATCH = 32, 20
TEST_SEED = 1000
FORMS = ("dense", "cp")


class Surrogate(nn.Module):
    """Residual CNN of four convolutions that adds its output to the last field."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, CHANNELS, 5)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 5)
        self.third = nn.Conv2d(CHANNELS, CHANNELS, 5)
        self.last = nn.Conv2d(CHANNELS, 1, 5)

    def forward(self, fields: Tensor) -> Tensor:
        """Map (batch, 2, side, side) to (batch, 1, side, side)."""
        hidden = F.gelu(self.first(mirrored(fields)))
        hidden = hidden + F.gelu(self.second(mirrored(hidden)))
        hidden = hidden + F.gelu(self.third(mirrored(hidden)))
        return fields[:, 1:] + self.last(mirrored(hidden))


def mirrored(fields: Tensor, width: int = 2) -> Tensor:
    """Pad (..., side, side) by the mirror image of its cells at each wall."""
    side = fields.shape[-1]
    cells = torch.arange(-width, side + width)
    cells = torch.where(cells < 0, -1 - cells, cells)
    cells = torch.where(cells >= side, 2 * side - 1 - cells, cells)
    return fields[..., cells, :][..., cells]


def relative_error(model: nn.Module, pairs: WavePairs) -> float:
    """Compute ‖û − u‖/‖u‖ over all pairs."""
    with torch.no_grad():
        found = model(pairs.inputs)
    return float((found - pairs.targets).norm() / pairs.targets.norm())


def train(form: str, seed: int, epochs: int, lr: float, test: WavePairs) -> tuple[Any, nn.Module]:
    """Train one surrogate; return its figures and itself."""
    pairs = WavePairs(*(each.float() for each in wave_pairs(400, seed)))
    torch.manual_seed(seed)
    model = Surrogate()
    steps = epochs * len(pairs.inputs) // BATCH
    methods = [compress.APrioriCP()] if form == "cp" else []
    session = compress.Session(model, methods, pairs.inputs[:2], steps, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0)
    session.attach(optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    begun, curve = time.process_time(), []
    for epoch in range(epochs):
        for rows in torch.randperm(len(pairs.inputs)).split(BATCH):
            optimizer.zero_grad()
            loss = F.mse_loss(model(pairs.inputs[rows]), pairs.targets[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
        curve.append(loss.item())
        print(f"{form}, seed {seed}, epoch {epoch + 1} of {epochs}: loss {loss:.2e}", flush=True)
    seconds = time.process_time() - begun
    session.finish()
    found = cost(model, pairs.inputs[:1])
    figures = {
        "relative_error": relative_error(model, test),
        "training_error": relative_error(model, pairs),
        "parameters": found.parameters,
        "macs": found.macs,
        "cpu_seconds": round(seconds, 1),
        "losses": curve,
    }
    return figures, model


def draw(models: dict[str, nn.Module], test: WavePairs, file: Path) -> None:
    """Draw the first test pair: its last input, its target and each model's error."""
    with torch.no_grad():
        found = {name: model(test.inputs[:1]) for name, model in models.items()}
    panels = {"u(t)": test.inputs[0, 1], "u(t + 4)": test.targets[0, 0]}
    panels |= {f"error, {name}": (each - test.targets[:1])[0, 0] for name, each in found.items()}
    figure = new_figure(2.6 * len(panels), 2.9)
    for number, (title, field) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        bound = float(field.abs().max())
        image = axes.imshow(field, cmap="RdBu_r", vmin=-bound, vmax=bound)
        axes.set_title(title)
        axes.set_axis_off()
        figure.colorbar(image, ax=axes, shrink=0.8)
    save(figure, file)


def main() -> int:
    """Measure what is missing in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 3e-3])
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--out", type=Path, default=Path("results/wave.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    entry = results.setdefault(f"{arguments.epochs} epochs", {})
    test = WavePairs(*(each.float() for each in wave_pairs(100, TEST_SEED)))
    for seed in arguments.seeds:
        models: dict[str, nn.Module] = {}
        for form in arguments.forms:
            runs = entry.setdefault(f"{form}, seed {seed}", {})
            for rate in arguments.rates:
                if f"{rate:g}" in runs:
                    continue
                figures, model = train(form, seed, arguments.epochs, rate, test)
                others = [each["training_error"] for each in runs.values()]
                if figures["training_error"] <= min(others, default=math.inf):
                    models[form] = model
                runs[f"{rate:g}"] = figures
                entry["provenance"] = provenance(torch.device("cpu"))
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            best = min(runs.values(), key=lambda each: each["training_error"])
            print(form, seed, {k: v for k, v in best.items() if k != "losses"}, flush=True)
        if len(models) == len(FORMS):
            draw(models, test, arguments.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
