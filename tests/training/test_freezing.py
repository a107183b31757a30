"""Frozen parts of a model in training."""

from types import SimpleNamespace

import pytest
import timm
import torch
from run_helpers import TINY, StopAt, assert_same_run
from torch import nn

from smallfry.errors import Stopped, UsageError
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import EMAConfig, ModelConfig, OptimizerConfig
from smallfry.training.freezing import Freezing, freeze
from smallfry.training.train import resume, train


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3, in_chans=1)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_backbone_is_all_but_the_classifier(model):
    Freezing(model, ["backbone"], None).at(10**9)
    assert trained(model) == {"fc.weight", "fc.bias"}


def test_patterns_are_those_of_a_shell(model):
    every = trained(model)
    Freezing(model, ["conv1.*", "layer?.0.conv1.weight"], None).at(0)
    frozen = every - trained(model)
    assert {"layer1.0.conv1.weight", "layer4.0.conv1.weight"} <= frozen
    assert all(n.startswith("conv1.") or n.endswith("conv1.weight") for n in frozen)


def test_parts_are_trained_from_their_step_on_and_frozen_again_before_it(model):
    every = trained(model)
    freezing = Freezing(model, ["backbone"], 3)
    counts = []
    for step in (0, 2, 3, 7, 1):
        model.train()
        freezing.at(step)
        counts.append(len(trained(model)))
    assert counts == [2, 2, len(every), len(every), 2]


def test_batch_norms_of_frozen_parts_keep_their_statistics(model):
    freezing = Freezing(model, ["conv1.*", "bn1.*"], 1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    freezing.at(0)
    model(torch.randn(4, 1, 32, 32))
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert not any(name.startswith(("conv1.", "bn1.")) for name in changed)
    assert any(name.startswith("layer1.0.bn1.") for name in changed)
    model.train()
    freezing.at(1)
    model(torch.randn(4, 1, 32, 32))
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_norms_without_weights_are_found_by_their_statistics():
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 2, 3)
    model = nn.Sequential(*layers)
    assert Freezing(model, ["0.*"], None).norms == []
    assert Freezing(nn.Sequential(*layers), ["[01].*"], None).norms == [layers[1]]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["cnv1*"], "no parameter is called 'cnv1\\*'"),
        (["*"], "leaves nothing to train"),
        (["backbone", "fc.*"], "leaves nothing to train"),
    ],
)
def test_wrong_patterns_are_refused(model, patterns, message):
    with pytest.raises(UsageError, match=message):
        Freezing(model, patterns, None)


def test_a_model_without_a_classifier_has_no_backbone():
    with pytest.raises(UsageError, match="names no classifier"):
        Freezing(nn.Linear(2, 2), ["backbone"], None)


@pytest.fixture
def frozen(variant, tmp_path):
    """A run that trains its classifier for an epoch, and then everything."""

    def make(name, optimizer="adamw"):
        return variant(
            model=ModelConfig(options=TINY, freeze=["backbone"], freeze_epochs=1),
            optimizer=OptimizerConfig(optimizer, lr=0.01, weight_decay=0.1),
            run=tmp_path / name,
        )

    return make


def weights_of(run):
    return load_checkpoint(run / "last").trainer["weights"]


def moved(run, before):
    return {name for name, w in weights_of(run).items() if not torch.equal(w, before[name])}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "kfac"])
def test_a_run_trains_the_classifier_first_and_resumes_exactly(frozen, optimizer):
    config = frozen("stopped", optimizer)
    with pytest.raises(Stopped):
        train(config, StopAt(1))
    first = weights_of(config.run)
    with pytest.raises(Stopped):
        resume(config.run, StopAt(4))
    assert moved(config.run, first) == {"head.weight", "head.bias"}
    resume(config.run)
    assert len(moved(config.run, first)) > 5
    train(frozen("whole", optimizer))
    assert_same_run(config.run, config.run.parent / "whole")


def test_a_part_that_is_never_trained_stays_as_it_is(variant, tmp_path):
    settings = {"epochs": 1, "ema": EMAConfig(0.0)}
    model = ModelConfig(options=TINY, freeze=["patch_embed*", "blocks.0.*"], drop_rate=0.1)
    with pytest.raises(Stopped):
        train(variant(model=model, **settings), StopAt(1))
    first = weights_of(tmp_path / "run")
    resume(tmp_path / "run")
    changed = moved(tmp_path / "run", first)
    assert changed
    assert not any(name.startswith(("patch_embed", "blocks.0.")) for name in changed)


def test_epochs_without_parts_are_refused():
    with pytest.raises(UsageError, match=r"freeze_epochs needs model\.freeze"):
        ModelConfig(freeze_epochs=2)
    with pytest.raises(UsageError, match="can't be negative"):
        ModelConfig(freeze="backbone", freeze_epochs=-1)
    assert ModelConfig(freeze="backbone").freeze == ["backbone"]


def test_later_parts_need_one_process(model):
    config = ModelConfig(freeze=["backbone"], freeze_epochs=1)
    with pytest.raises(UsageError, match="one process"):
        freeze(model, config, 10, SimpleNamespace(count=2))
