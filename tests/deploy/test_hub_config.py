"""Readers of a shared folder's description, part by part."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from smallfry.deploy import hub_config
from smallfry.deploy.hub_config import CONFIG, described, read_config, read_weights
from smallfry.errors import RunError, SmallfryWarning, UsageError

NAME = "simplenet_cifar_310k"


def write(folder, content):
    (folder / CONFIG).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / CONFIG


@pytest.mark.parametrize("extra", [{}, {"smallfry": {"format": 1}}, {"smallfry": {"format": 2}}])
def test_a_description_is_read(tmp_path, extra):
    content = {"architecture": NAME} | extra
    assert read_config(write(tmp_path, content)) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read"),
        ("[]", "does not describe a timm model, as it has no architecture"),
        ("3", "has no architecture"),
        ({"architecture": 3}, "models of other libraries are not supported"),
        ({"model_type": "bert"}, "models of other libraries are not supported"),
        ({"architecture": NAME, "smallfry": []}, "its entry 'smallfry' has no format"),
        ({"architecture": NAME, "smallfry": {"format": "2"}}, "has no format"),
        (
            {"architecture": NAME, "smallfry": {"format": 5}},
            r"written by smallfry \? in format 5; .* reads up to format 4: install a newer one",
        ),
    ],
)
def test_another_description_is_refused(tmp_path, content, message):
    with pytest.raises(RunError, match=message):
        read_config(write(tmp_path, content))


def test_a_missing_description_is_named(tmp_path):
    with pytest.raises(RunError, match=r"not a shared model, config\.json is missing"):
        read_config(tmp_path / CONFIG)
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(RunError, match="can't be read"):
        read_config(tmp_path / CONFIG)


def save(folder):
    data = safetensors.torch.save({"weight": torch.arange(3.0)})
    (folder / "model.safetensors").write_bytes(data)
    return {"weights": {"sha256": hashlib.sha256(data).hexdigest()}}


def test_weights_are_read_and_their_hash_compared(tmp_path):
    facts = save(tmp_path)
    for known in (facts, None):
        assert read_weights(tmp_path, known)["weight"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "facts", [{}, {"weights": None}, {"weights": {}}, {"weights": {"sha256": "0" * 64}}]
)
def test_weights_without_their_hash_are_refused(tmp_path, facts):
    save(tmp_path)
    with pytest.raises(RunError, match=r"its hash is not that in config\.json; copy or fetch"):
        read_weights(tmp_path, facts)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"\x80\x02}q\x00."])
def test_other_files_are_no_weights(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"model\.safetensors: damaged"):
        read_weights(tmp_path, None)


def test_memory_that_runs_out_is_told(tmp_path, monkeypatch):
    def fail(_):
        raise MemoryError

    monkeypatch.setattr(hub_config, "read_large", fail)
    with pytest.raises(RunError, match=r"can't be read \(out of memory\)"):
        read_weights(tmp_path, None)


CFG = {
    "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "num_classes": 2,
    "interpolation": "bilinear", "crop_pct": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    import timm

    return timm.create_model(NAME, num_classes=2).state_dict()


def describe(weights, classes=("a", "b"), facts=None, **changes):
    config = {"architecture": NAME, "num_classes": 2, "pretrained_cfg": CFG | changes}
    return described(config, facts, classes, weights, "here")


def test_a_model_of_timm_is_built_with_its_weights(weights):
    trained = describe(weights)
    assert trained.classes == ("a", "b")
    assert (trained.image_size, trained.channels) == (32, 3)
    assert not trained.model.training
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert trained.manifest["data"] == {"name": "unknown", "fingerprint": "unknown"}
    assert trained.manifest["model"]["arguments"] == {"num_classes": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": [3, 32, 0]}, "expects images of 3×32×0"),
        ({"input_size": [2, 32, 32]}, "with 1 or 3 channels"),
        ({"input_size": [3, 0, 0]}, "expects images of 3×0×0"),
        ({"input_size": [3, 10**6, 10**6]}, "at most 4096 pixels per side"),
        ({"mean": [0.5]}, "don't fit 3 channels"),
        ({"std": [0.2, 0.2, 0.0]}, "don't fit 3 channels"),
        ({"std": [0.2, 0.2, -1.0]}, "don't fit 3 channels"),
    ],
)
def test_images_that_smallfry_can_not_prepare_are_refused(weights, changes, message):
    with pytest.raises(RunError, match=message):
        describe(weights, **changes)


def test_another_view_of_the_images_is_warned_of(weights):
    with pytest.warns(SmallfryWarning, match=r"scaled bicubic and cropped to 0\.875 of their side"):
        describe(weights, interpolation="bicubic", crop_pct=0.875)


def test_class_names_are_in_the_order_of_the_logits(weights):
    names = {"1": "two", "0": "one"}
    assert describe(weights, None, label_names=names).classes == ("one", "two")
    assert describe(weights, None, label_names=["x", "y"]).classes == ("x", "y")
    assert describe(weights, ("p", "q"), label_names=["x", "y"]).classes == ("p", "q")
    with pytest.raises(UsageError, match="does not name its 2 classes"):
        describe(weights, None)
    with pytest.raises(UsageError, match="has 2 classes, but 3 names for them"):
        describe(weights, ("a", "b", "c"))
    with pytest.raises(RunError, match="has 2 classes, but 1 names for them"):
        describe(weights, None, label_names=["x"])


@pytest.mark.parametrize("name", ["data", "training", "measured", "provenance", "start", "teacher"])
def test_facts_of_another_type_are_refused(weights, name):
    with pytest.raises(TypeError, match=f"smallfry.{name} is no object"):
        describe(weights, facts={"format": 2, name: [1]})


@pytest.mark.parametrize("depth", [0, "8", 3.5, True])
def test_a_bit_depth_that_is_none_is_refused(weights, depth):
    with pytest.raises(ValueError, match="bit_depth"):
        describe(weights, facts={"format": 2, "bit_depth": depth})
    with pytest.raises(TypeError, match="methods is no list"):
        describe(weights, facts={"format": 2, "methods": {}})


SPLITS = {"validation": 0.1, "test": 0.2, "split_seed": 0, "limit": None, "label": None,
          "skip_unreadable": False, "stream": None, "remove_duplicates": False}  # fmt: skip


@pytest.mark.parametrize(
    ("splits", "kept"),
    [
        (SPLITS, SPLITS),
        ({k: v for k, v in SPLITS.items() if k not in ("stream", "remove_duplicates")}, SPLITS),
        (SPLITS | {"more": 1}, None),
        (SPLITS | {"limit": "3"}, None),
        ({"test": 0.1}, None),
        ("text", None),
    ],
)
def test_splits_are_kept_in_the_form_of_the_settings_alone(splits, kept):
    found = hub_config._data({"name": "set", "splits": splits})
    assert found.get("splits") == kept
    assert found["name"] == "set"
    assert found["fingerprint"] == "unknown"
