"""``erase_operators`` from the command to the exported model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import smallfry
from smallfry.cli import main
from smallfry.deploy import Runtime

RUN = Path(__file__).parents[1] / "fixtures" / "format_2" / "run"
FAST = "{optimizer.name: adamw, augment.mixup: 0.0, batch_size: 32}"
ERASE = "[{erase_operators: {sparsity: 0.6, begin: 0, end: 0.8}}]"

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def erased(run):
    """Return what is erased in a run that was loaded, and exported with equal outputs."""
    assert main(["evaluate", run, "--json"]) == 0
    assert main(["export", run, "--to", "export"]) == 0
    trained = smallfry.load(run)
    pixels = torch.randint(256, (3, *trained.input_shape), dtype=torch.uint8)
    with torch.no_grad():
        expected = trained.model.eval()(trained.normalize(pixels / 255)).softmax(1)
    given = Runtime(Path("export"), threads=1).predict(pixels.numpy())
    np.testing.assert_allclose(given.probabilities, expected, atol=1e-4)
    manifest = json.loads(Path(run, "best", "manifest.json").read_text())
    (transform,) = manifest["model"]["transforms"]
    assert transform["kind"] == "erase"
    return transform


def test_a_network_of_timm_is_trained_without_some_of_its_branches():
    words = ["--epochs", "2", "--data.limit", "128", "--progress", "quiet", "--references", "false"]
    methods = ["--model.name", "resnet10t", "--methods", ERASE]
    assert main(["train", "--run", "run", *words, *methods]) == 0
    found = erased("run")
    assert len(found["zeros"]) == 4  # of three branches and three shortcuts, and a further branch
    assert found["steps"] == {}


def test_a_recursive_model_is_compressed_to_fewer_branches_and_steps():
    shutil.copytree(RUN, "run")
    words = ["--epochs", "2", "--tuning", FAST, "--to", "small"]
    assert main(["compress", "run", "--methods", ERASE, *words]) == 0
    found = erased("small")
    assert len(found["zeros"]) == 3  # of attention and MLP of three layers
    ((name, count),) = found["steps"].items()  # one of the three beyond the first
    assert count == getattr(smallfry.load("run").model, name) - 1
    assert count == getattr(smallfry.load("small").model, name)
