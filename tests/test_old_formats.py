"""Run folders, exports and shared folders of earlier versions can still be used.

``fixtures/format_N`` was written by the last commit that wrote checkpoints in format N.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from smallfry.deploy.export import export
from smallfry.deploy.pretrained import load_trained
from smallfry.training.train import resume
from smallfry_runtime import Runtime

OLD = sorted((Path(__file__).parent / "fixtures").glob("format_*"))


@pytest.fixture(params=OLD, ids=lambda folder: folder.name)
def old(request, tmp_path):
    """A copy, as a run that is resumed writes into its folder."""
    return shutil.copytree(request.param, tmp_path / "old")


@pytest.fixture
def expected(old):
    return json.loads((old / "expected.json").read_text())


@pytest.fixture
def pixels():
    return (load_digits().images[:8] * 255 / 16).round().astype(np.uint8)[:, None]


@pytest.mark.parametrize("name", ["run", "run/last", "shared"])
def test_a_run_and_a_shared_folder_give_the_logits_they_gave(old, expected, pixels, name):
    trained = load_trained(old / name)
    with torch.no_grad():
        logits = trained.model(trained.normalize(torch.from_numpy(pixels)))
    assert list(trained.classes) == expected["classes"]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_an_export_gives_the_probabilities_it_gave(old, expected, pixels, name):
    found = Runtime(old / "exports" / name).predict(pixels).probabilities
    np.testing.assert_allclose(found, expected[name], atol=1e-5)


@pytest.mark.slow
def test_a_run_is_continued_and_exported(old, pixels, tmp_path):
    summary = resume(old / "run", changes={"epochs": 2})
    assert summary["measured"]["epochs"] == 2
    assert "cpu_seconds" not in summary["measured"]  # its first epoch's are not known
    export(old / "run", tmp_path / "new")
    assert Runtime(tmp_path / "new").predict(pixels).probabilities.shape == (8, 10)
