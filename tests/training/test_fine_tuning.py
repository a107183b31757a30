"""Training runs that start from another model."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_helpers import StopAt, assert_same_run

import smallfry
from smallfry import compress
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import RunError, Stopped, UsageError
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import (
    DataConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    read_config,
)
from smallfry.training.run import load_run
from smallfry.training.train import resume, train

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format_2"
THREE = [
    compress.Magnitude(sparsity=0.4, divisible=2),
    compress.LowRank(keep=0.6, smallest=64),
    compress.RoundWeights(bits=8, include=["*halt*", "conv1.0"]),
]
STILL = {"optimizer": OptimizerConfig("sgd", lr=1e-12), "ema": EMAConfig(0.0), "epochs": 1}


@pytest.fixture
def source(tmp_path):
    """A run to start from, of digits."""
    return shutil.copytree(FIXTURES / "run", tmp_path / "source")


@pytest.fixture
def started(variant, source):
    """A run that starts from it."""

    def make(start=source, **changes):
        given = {"model": ModelConfig(start=str(start)), "objective": ObjectiveConfig()}
        return variant(**{**given, **changes})

    return make


@pytest.fixture
def stripes(tmp_path):
    """Images of three classes, and as large as photographs."""
    random = np.random.default_rng(0)
    for name in ("across", "along", "none"):
        (tmp_path / "stripes" / name).mkdir(parents=True)
        for number in range(30):
            pixels = random.integers(0, 100, (32, 32))
            pixels[::4] += 100 * (name == "across")
            pixels[:, ::4] += 100 * (name == "along")
            file = tmp_path / "stripes" / name / f"{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return tmp_path / "stripes"


def assert_near(weights, others):
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=1e-6, rtol=0)


def test_a_run_starts_from_the_weights_and_images_of_another(started, source):
    before = load_run(source)
    summary = train(started(**STILL))
    trained = load_run(started().run)
    assert trained.spec == before.spec
    assert_near(trained.model.state_dict(), before.model.state_dict())
    assert trained.manifest["input"] == before.manifest["input"]
    digest = hashlib.sha256((source / "best" / "model.safetensors").read_bytes()).hexdigest()
    assert trained.manifest["start"] == {
        "name": "source",
        "model": before.spec.architecture,
        "weights_sha256": digest,
        "data": {key: before.manifest["data"][key] for key in ("name", "fingerprint")},
    }
    assert summary["provenance"]["start"] == trained.manifest["start"]
    assert read_config(started().run / "config.yaml").model.start == str(source)


def test_a_stopped_run_goes_on_without_its_source(started, source, tmp_path):
    train(started(run=tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(started(run=tmp_path / "parted"), StopAt(5))
    shutil.rmtree(source)
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
    manifests = [load_checkpoint(tmp_path / n / "best").manifest for n in ("whole", "parted")]
    assert manifests[0] == manifests[1]


def test_another_number_of_classes_has_a_new_classifier(started, source, stripes):
    train(started(data=DataConfig(str(stripes)), **{**STILL, "batch_size": 8}))
    before, trained = load_run(source), load_run(started().run)
    assert trained.classes == ("across", "along", "none")
    assert (trained.image_size, trained.channels) == (before.image_size, before.channels)
    old, new = before.model.state_dict(), trained.model.state_dict()
    assert new["head.weight"].shape == (3, old["head.weight"].shape[1])
    kept = {name: weight for name, weight in new.items() if not name.startswith("head.")}
    assert_near(kept, old)
    assert trained.manifest["model"]["arguments"]["num_classes"] == 3


@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
@pytest.mark.parametrize(
    "name", ["vitrm_micro_patch4_8", pytest.param("resnet10t", marks=pytest.mark.slow)]
)
def test_a_compressed_model_is_tuned_for_other_classes(variant, stripes, tmp_path, name):
    pytest.importorskip("torch_pruning")
    options = {"depth": 1} if name.startswith("vitrm") else {"stem_width": 8}
    size = {"image_size": 8 if name.startswith("vitrm") else 32}
    plain = {"objective": ObjectiveConfig(), "run": tmp_path / "big", "epochs": 1}
    train(
        variant(
            **plain, data=DataConfig(limit=64, **size), model=ModelConfig(name, options=options)
        )
    )
    small = compress.apply(load_run(tmp_path / "big"), THREE)
    small.save(tmp_path / "small")
    head = "head" if name.startswith("vitrm") else "fc"
    assert any(
        head in key for t in small.spec.to_dict()["transforms"] for key in t.get("settings", ())
    )
    model = ModelConfig(start=str(tmp_path / "small"))
    changes = {"batch_size": 8, "objective": ObjectiveConfig(), "model": model}
    train(variant(**changes, run=tmp_path / "tuned", data=DataConfig(str(stripes)), **STILL))
    tuned = load_run(tmp_path / "tuned")
    assert [each.kind for each in tuned.spec.transforms] == [
        each.kind for each in small.spec.transforms
    ]
    assert tuned.manifest["methods"] == json.loads(json.dumps(small.manifest["methods"]))
    new, old = tuned.model.state_dict(), small.model.state_dict()
    kept = {k: v for k, v in new.items() if not k.startswith(f"{head}.") and "running" not in k}
    assert kept.keys() <= old.keys()
    assert_near({k: v for k, v in kept.items() if "num_batches" not in k}, old)
    images = torch.zeros(1, tuned.channels, tuned.image_size, tuned.image_size)
    assert tuned.model(images).shape == (1, 3)


def test_a_tuned_run_has_methods_of_its_own(started, source, tmp_path):
    first = compress.LowRank(keep=0.9, include=("*.mlp.*",), smallest=64)
    compress.apply(load_run(source), [first]).save(tmp_path / "small")
    train(started(tmp_path / "small", methods=["round_weights"], epochs=1))
    trained = load_run(started().run)
    assert [next(iter(each)) for each in trained.manifest["methods"]] == [
        *("low_rank", "round_weights")
    ]
    assert [each.kind for each in trained.spec.transforms] == ["replace", "bits"]
    assert trained.manifest["start"]["name"] == "small"


def test_arguments_that_change_no_weights_can_be_others(started, source):
    model = ModelConfig(start=str(source), drop_rate=0.3, recursion_steps=2)
    train(started(model=model, epochs=1))
    arguments = load_run(started().run).spec.arguments
    assert (arguments["drop_rate"], arguments["recursion_steps"]) == (0.3, 2)


def test_a_shared_folder_is_a_start_too(started, source, tmp_path, capsys):
    assert main(["share", str(source), "--to", str(tmp_path / "shared")]) == 0
    train(started(tmp_path / "shared", **STILL))
    trained = load_run(started().run)
    file = tmp_path / "shared" / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert trained.manifest["start"]["weights_sha256"] == digest
    assert_near(trained.model.state_dict(), smallfry.load(source).model.state_dict())
    assert main(["share", str(started().run), "--to", str(tmp_path / "again")]) == 0
    assert f"`shared`, weights `{digest[:16]}`" in (tmp_path / "again/README.md").read_text()
    assert smallfry.load(tmp_path / "again").manifest["start"] == trained.manifest["start"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "resnet18"}}, "is a vitrm.*leave model.name out"),
        (
            {"model": {"options": {"pretrained": True}}},
            "pretrained and model.start both name weights",
        ),
        ({"model": {"options": {"embed_dim": 32}}}, "leave out embed_dim"),
        ({"model": {"options": {"num_classes": 3}}}, "num_classes comes from"),
        ({"data": {"image_size": 18}}, "takes images of 8×8 pixels, not 18×18"),
        ({"data": {"channels": 3}}, "takes images of 1 channels, not 3"),
    ],
)
def test_settings_that_contradict_the_start_are_refused(started, source, changes, message):
    model = ModelConfig(**{"start": str(source), **changes.get("model", {})})
    with pytest.raises(UsageError, match=message):
        train(started(model=model, data=DataConfig(limit=64, **changes.get("data", {}))))
    assert not started().run.exists()


def test_what_is_no_trained_model_is_refused_before_data_is_read(started, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "smallfry.training.train.load_training_data", lambda *_: pytest.fail("data was read")
    )
    for start, message in (
        (FIXTURES / "exports" / "float32", "is an export"),
        (tmp_path / "nothing", "no such file or folder; expected a run folder"),
    ):
        with pytest.raises(RunError, match=message):
            train(started(start))


def test_the_command_starts_from_a_run(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--data.limit", "64", "--epochs", "1", "--references", "false", "--progress", "quiet"]
    assert main(["train", "--model.start", "source", "--run", "tuned", *words]) == 0
    assert load_run("tuned").manifest["start"]["name"] == "source"
    assert load_data("digits").channels == load_run("tuned").channels
