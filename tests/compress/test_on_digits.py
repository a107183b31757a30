"""Accuracy on scikit-learn's digits of what prunes and sparsifies while training."""

import importlib.util
import statistics
from pathlib import Path

import pytest
import torch

from smallfry import compress
from smallfry.optim import KFAC
from smallfry.transforms import ModelSpec, build

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[2] / "benchmarks" / "sparse_digits.py"
SPEC = importlib.util.spec_from_file_location("sparse_digits", FILE)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

OPTIMIZERS = {
    "adamw": script.adamw,
    "kfac": lambda model: KFAC(
        model, 0.05, likelihood="categorical", check="off", weight_decay=1e-3
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hesso_removes_half_of_the_channels_within_a_few_images(name):
    spec = ModelSpec("gated_mlp", {"num_classes": 10})
    optimizer = OPTIMIZERS[name]
    found = {"whole": [], "pruned": []}
    for seed in range(3):
        for kind in found:
            torch.manual_seed(seed)
            model = build(spec)
            method = compress.HESSO(0.5, periods=5, divisible=8)
            methods = [method] if kind == "pruned" else []
            before = sum(p.numel() for p in model.parameters())
            model, *test = script.trained(model, methods, seed, 30, optimizer, spec=spec)
            found[kind].append(script.accuracy(model, *test))
            if kind == "pruned":
                left = [m.out_features for n, m in model.named_modules() if "fc" in n]
                total = 64 * len(left)
                assert abs(sum(left) - total // 2) <= 8 * len(left)
                assert all(width % 8 == 0 for width in left)
                assert sum(p.numel() for p in model.parameters()) < 0.7 * before
    whole, pruned = (statistics.mean(found[kind]) for kind in found)
    assert pruned >= whole - 0.006, found


def test_rigl_is_near_dense_training_and_above_static_masks():
    mean = {
        name: statistics.mean(
            script.accuracy(*script.trained(script.mlp(seed), methods, seed, 40))
            for seed in range(3)
        )
        for name, methods in script.SPARSE.items()
    }
    assert mean["RigL"] >= mean["dense"] - 0.01, mean
    assert mean["RigL"] >= mean["static random masks"], mean


def test_penalties_for_robust_sparsity_improve_the_condition_of_the_matrices():
    """The accuracy under attack is a figure of docs/pruning.md, and no claim."""
    alone, penalised = (
        [script.robust(methods, seed) for seed in range(2)] for methods in script.ROBUST.values()
    )
    assert min(each["accuracy"] for each in (*alone, *penalised)) > 0.8
    conditions = [
        statistics.mean(each["log_condition"] for each in found) for found in (alone, penalised)
    ]
    assert conditions[1] < conditions[0]
