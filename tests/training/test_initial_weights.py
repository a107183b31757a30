"""Initial weights of timm's architectures, from files and from the hub."""

import json

import pytest
import timm
import torch
from run_helpers import StopAt
from safetensors.torch import save_file

from smallfry.errors import RunError, Stopped, UsageError
from smallfry.training import initial_weights
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import (
    DataConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.initial_weights import find_weights, like_weights
from smallfry.training.train import resume, train

NAME = "test_resnet"  # timm's smallest one


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of seven classes."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    save_file(timm.create_model(NAME, num_classes=7).state_dict(), path)
    return path


@pytest.fixture
def begun(variant, file):
    """The state of a run before its first step has changed much."""

    def begin(**model):
        config = variant(
            model=ModelConfig(NAME, start=str(file), **model),
            data=DataConfig(limit=100, image_size=32),
            objective=ObjectiveConfig(),
            ema=EMAConfig(0.0),
        )
        with pytest.raises(Stopped):
            train(config, StopAt(1))
        return config.run

    return begin


def test_weights_of_a_file_are_trained_on_with_a_new_classifier(begun, file):
    run = begun(freeze=["backbone"])
    weights = load_checkpoint(run / "last").trainer["weights"]
    expected = timm.create_model(
        NAME, num_classes=7, pretrained=True, pretrained_cfg_overlay={"file": str(file)}
    ).state_dict()
    assert weights["fc.weight"].shape[0] == 10
    for name, weight in expected.items():
        if not name.startswith("fc."):
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)


def test_manifests_name_the_weights_and_no_path(begun, file):
    manifest = load_checkpoint(begun() / "last").manifest
    assert manifest["start"]["name"] == "seven.safetensors"
    assert len(manifest["start"]["weights_sha256"]) == 64
    assert str(file.parent) not in json.dumps(manifest)
    assert "pretrained" not in json.dumps(manifest["model"])


def test_images_are_normalised_as_the_weights_take_them(begun):
    run = begun()
    cfg = timm.get_pretrained_cfg(NAME)
    recorded = read_config(run / "config.yaml").data
    assert (recorded.mean, recorded.std) == (list(cfg.mean), list(cfg.std))
    assert (recorded.channels, recorded.image_size) == (3, 32)


def test_a_run_is_resumed_without_the_file(begun, file, tmp_path):
    run = begun()
    hidden = file.rename(tmp_path / "moved")
    try:
        assert resume(run)["provenance"]["start"]["name"] == "seven.safetensors"
    finally:
        hidden.rename(file)


def test_as_many_classes_keep_the_classifier(variant, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model(NAME, num_classes=10).state_dict()
    save_file(state, tmp_path / "ten.safetensors")
    config = variant(
        model=ModelConfig(NAME, start=str(tmp_path / "ten.safetensors"), freeze=["*.*.*"]),
        data=DataConfig(limit=100, image_size=32),
        objective=ObjectiveConfig(),
    )
    lines = []

    class Heard(StopAt):
        def say(self, text):
            lines.append(text)

    with pytest.raises(Stopped):
        train(config, Heard(1))
    assert "starting from ten.safetensors: classifier kept" in lines


def test_given_normalisation_stays(file):
    weights = find_weights(ModelConfig(NAME, start=str(file)))
    given = DataConfig(mean=[0.0] * 3, std=[1.0] * 3, image_size=48)
    data = like_weights(TrainConfig(data=given), weights).data
    assert (data.mean, data.std, data.image_size) == ([0.0] * 3, [1.0] * 3, 48)
    grey = like_weights(TrainConfig(data=DataConfig(channels=1)), weights).data
    assert (grey.channels, grey.mean) == (1, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"start": "true"}, "needs the architecture"),
        ({"start": "x.safetensors"}, "needs the architecture"),
        ({"name": "resnet1", "start": True}, "unknown model 'resnet1'; did you mean"),
        ({"name": NAME, "start": "old/model.pth"}, "pickled files are not read"),
        ({"name": NAME, "start": "no.safetensors"}, "there is no file no.safetensors"),
        ({"name": "vitrm_micro_patch4_8", "start": True}, "timm has no weights for vitrm_micro"),
        ({"name": NAME, "start": True, "options": {"pretrained": True}}, "both name weights"),
    ],
)
def test_starts_without_weights_are_refused(config, message):
    with pytest.raises(UsageError, match=message):
        find_weights(ModelConfig(**config))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RunError, match="not a file of safetensors"):
        find_weights(ModelConfig(NAME, start=str(tmp_path / "w.safetensors")))


def test_weights_of_another_architecture_are_refused(variant, file):
    config = variant(
        model=ModelConfig("resnet10t", start=str(file)), objective=ObjectiveConfig(), epochs=1
    )
    with pytest.raises(UsageError, match="the weights do not fit resnet10t"):
        train(config)
    assert not config.run.exists()


def test_without_a_network_the_error_comes_at_once_and_names_local_files(monkeypatch):
    asked = []

    def unreachable(url, timeout):
        asked.append((url, timeout))
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(UsageError, match=r"give a file of them.*--model.start NAME.safetensors"):
        find_weights(ModelConfig("resnet18", start=True))
    assert [timeout for _, timeout in asked] == [initial_weights.WAITING]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        find_weights(ModelConfig("resnet18", start=True))
    assert len(asked) == 1


def test_cached_weights_need_no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: "here")
    found = find_weights(ModelConfig("resnet18", start=True))
    assert (found.name, found.classes, found.size) == ("resnet18.a1_in1k", 1000, 224)
    assert found.facts("resnet18") == {
        "name": "resnet18.a1_in1k",
        "model": "resnet18",
        "license": "apache-2.0",
    }
