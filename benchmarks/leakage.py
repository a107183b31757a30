"""Identification of three block families from operators, before and after disguise.

    python benchmarks/leakage.py --out results/leakage.json

Five networks of random widths and depths of each family: plain 3×3 convolutions, depthwise
separable ones (MobileNetV1) and inverted residuals (MobileNetV2), of three stages and 32×32 images.
Each is identified by an attack that has learnt from all others. Then all are rewritten for one
schedule: largest change of the outputs, multiply-accumulates and milliseconds as multiples.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from smallfry.analysis.disguise import disguise, plan_schedule
from smallfry.analysis.leakage import features_of, identify
from smallfry.analysis.traces import trace_model
from smallfry.costing import macs
from smallfry.training.provenance import provenance

SHAPE, STAGES, COPIES = (3, 32, 32), 3, 5


def layer(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[Any]:
    """Build a convolution with norm and activation."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


class Inverted(nn.Module):
    """Inverted residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers = [*layer(inputs, wide, 1), *layer(wide, wide, 3, stride, wide)]
        self.layers = nn.Sequential(*layers, *layer(wide, outputs, 1)[:2])
        self.adds = stride == 1 and inputs == outputs

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        changed = self.layers(features)
        return features + changed if self.adds else changed


def network(family: str, generator: np.random.Generator) -> nn.Module:
    """Build a network of a family with random widths, depths and batch statistics."""
    width = int(generator.choice([8, 12, 16]))
    layers = layer(3, width)
    for _ in range(STAGES):
        wider = width + int(generator.choice([4, 8, 12]))
        strides = [2] + [1] * int(generator.integers(1, 3))
        for stride in strides:
            if family == "plain":
                layers += layer(width, wider, 3, stride)
            elif family == "separable":
                layers += [*layer(width, width, 3, stride, width), *layer(width, wider, 1)]
            else:
                layers.append(Inverted(width, wider, stride, int(generator.choice([2, 3]))))
            width = wider
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def milliseconds(model: nn.Module, image: torch.Tensor) -> float:
    """Measure the median of 21 calls."""
    times = []
    for _ in range(21):
        began = time.perf_counter()
        model(image)
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[10]


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Attack the networks before and after the disguise."""
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    families = ("plain", "separable", "inverted")
    models = {f"{f} {n}": network(f, generator) for f in families for n in range(COPIES)}
    true = {name: name.split()[0] for name in models}
    schedule = plan_schedule(list(models.values()))
    hidden = {name: disguise(model, schedule) for name, model in models.items()}
    image = torch.randn(1, *SHAPE)
    found: dict[str, Any] = {"schedule": schedule._asdict(), "networks": len(models)}
    for title, those in (("before", models), ("after", hidden)):
        features = {n: features_of(trace_model(m, SHAPE), "operators") for n, m in those.items()}
        result = identify(features, true, {name: name for name in models})
        found[title] = {"accuracy": result.accuracy, "bits": result.bits}
    changes = [(hidden[n](image) - models[n](image)).abs().max().item() for n in models]
    found["largest change of the outputs"] = max(changes)
    for family in families:
        own = [name for name in models if true[name] == family]
        ratios = [macs(hidden[n], image) / macs(models[n], image) for n in own]
        slower = [milliseconds(hidden[n], image) / milliseconds(models[n], image) for n in own]
        found[family] = {"macs": float(np.median(ratios)), "ms": float(np.median(slower))}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/leakage.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure() | {"provenance": provenance(torch.device("cpu"))}
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
