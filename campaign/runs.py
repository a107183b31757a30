"""Tiny training runs on handwritten digits, and their comparison."""

import csv
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from campaign.neighbours import MARK
from smallfry.training import conclusion
from smallfry.training.checkpoint import Checkpoint, load_checkpoint
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
TIMINGS = ("images_per_second", "seconds")
ROUNDING = 1e-3  # what rounding of float32 becomes in 9 steps
COUNTS = ("accuracy", "f1", "calibration_error")  # metrics that change by whole images
FLIPS = 0.05  # of such a metric, where a few images are on the boundary
CONFIG = TrainConfig(
    data=DataConfig(limit=200),
    model=ModelConfig(options=TINY, drop_rate=0.1),
    augment=AugmentConfig(crop_padding=1, flip=True, mixup=0.2, cutmix=1.0),
    objective=ObjectiveConfig(supervision_steps=2),
    epochs=3,
    batch_size=64,
    threads=1,
    workers=0,
    checkpoint_seconds=0.0,  # a checkpoint after each of its 9 steps
    references=False,
    progress="quiet",
)


def write_config(file: Path, run: Path, **changes: Any) -> None:
    """Write the configuration of a tiny run."""
    file.write_text(yaml.safe_dump(replace(CONFIG, run=run, **changes).to_dict()))


def of_optimizer(name: str) -> OptimizerConfig:
    """Return the settings of an optimizer for a short run."""
    return OptimizerConfig(name, clip=1.0)


def without_pictures() -> None:
    """Disable pictures, which take longer than a tiny run."""
    conclusion.draw_run = lambda *arguments: None  # type: ignore[assignment]


def difference(one: Path, other: Path) -> str | None:
    """Describe the first difference of two runs: rows, weights, optimizer, folder contents."""
    if _rows(one) != _rows(other):
        return "metrics.csv has other rows"
    for name in ("last", "best"):
        found = _differs(load_checkpoint(one / name), load_checkpoint(other / name))
        if found:
            return f"{name}: {found}"
    left = [entry for entry in os.listdir(other) if entry.startswith(MARK)]
    return f"{left[0]} is left" if left else None


def rounds_alike(one: Path, other: Path) -> bool:
    """Return whether two runs have equal rows and weights up to rounding.

    Rounding may move an image over the boundary of its class, and with it the choice of the best
    epoch, whose weights are compared if it is the same one.
    """
    if len(_rows(one)) != len(_rows(other)):
        return False
    pairs = zip(_rows(one), _rows(other), strict=True)
    if not all(_close(key, a[key], b[key]) for a, b in pairs for key in a):
        return False
    for name in ("last", "best"):
        first, second = (load_checkpoint(run / name) for run in (one, other))
        if _step(first) != _step(second):
            if name == "best":
                continue
            return False
        for key, weight in first.weights.items():
            if (weight - second.weights[key]).norm() > ROUNDING * (1 + weight.norm()):
                return False
    return True


def _close(name: str, one: str, other: str) -> bool:
    if one == other:
        return True
    if name.endswith(COUNTS):
        return abs(float(one) - float(other)) <= FLIPS
    return math.isclose(float(one), float(other), rel_tol=ROUNDING)


def _step(checkpoint: Checkpoint) -> int:
    return checkpoint.manifest["training"]["step"]


def _differs(one: Checkpoint, other: Checkpoint) -> str | None:
    if one.manifest["training"] != other.manifest["training"]:
        return "another step"
    if not same(one.weights, other.weights):
        return "other weights"
    if one.trainer is None or other.trainer is None:
        return None
    for part in ("weights", "optimizer"):
        if not same(one.trainer[part], other.trainer[part]):
            return f"another state of the {part}"
    return None


def same(one: Any, other: Any) -> bool:
    """Return whether two trees of tensors and values are bit-identical, without timings."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(
            one.nan_to_num(1.25), other.nan_to_num(1.25)
        )
    if isinstance(one, dict):
        keys = [key for key in one if "seconds" not in str(key)]
        return isinstance(other, dict) and all(same(one[k], other.get(k)) for k in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return bool(one == other)


def _rows(run: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]
