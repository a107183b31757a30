"""A configuration takes what is natural to write, and says of the rest what was expected."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from torch import nn

from smallfry.errors import UsageError
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.train import train


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"run": "runs/x"}, {"run": Path("runs/x")}),
        ({"data": "digits"}, {"data": DataConfig("digits")}),
        ({"data": Path("photos")}, {"data": DataConfig("photos")}),
        ({"data": {"root": "/d", "limit": 3}}, {"data": DataConfig(root=Path("/d"), limit=3)}),
        ({"model": "resnet18"}, {"model": ModelConfig("resnet18")}),
        ({"optimizer": "kfac"}, {"optimizer": OptimizerConfig("kfac")}),
        ({"optimizer": {"betas": [0.9, 0.99]}}, {"optimizer": OptimizerConfig(betas=(0.9, 0.99))}),
        ({"objective": "cross_entropy"}, {"objective": ObjectiveConfig("cross_entropy")}),
        ({"augment": {"flip": True}}, {"augment": AugmentConfig(flip=True)}),
        ({"checkpoint_seconds": 3}, {"checkpoint_seconds": 3.0}),
        ({"seed": np.int64(3), "compile": np.True_}, {"seed": 3, "compile": True}),
    ],
)
def test_what_is_natural_is_taken_for_what_it_means(given, meant, tmp_path):
    config = TrainConfig(**given)
    assert config == TrainConfig(**meant)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert read_config(file) == config


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (TrainConfig, {"data": 3}, "data must be DataConfig, a name or a mapping, not 3"),
        (
            TrainConfig,
            {"model": nn.Sequential(nn.ReLU())},
            "model must be ModelConfig, a name or a mapping, not Sequential( (0): ReLU() )",
        ),
        (TrainConfig, {"data": {"limt": 3}}, "data has no setting 'limt'; there are name, root"),
        (TrainConfig, {"data": {"limit": "3"}}, "data.limit must be a whole number, not '3'"),
        (TrainConfig, {"ema": 0.9}, "ema must be EMAConfig or a mapping, not 0.9"),
        (TrainConfig, {"run": 7}, "run must be a path, not 7"),
        (TrainConfig, {"epochs": "3"}, "epochs must be a whole number, not '3'"),
        (TrainConfig, {"epochs": 1.5}, "epochs must be a whole number, not 1.5"),
        (TrainConfig, {"epochs": True}, "epochs must be a whole number, not True"),
        (TrainConfig, {"epochs": None}, "epochs can't be null"),
        (TrainConfig, {"compile": "yes"}, "compile must be True or False, not 'yes'"),
        (TrainConfig, {"progress": "loud"}, "progress must be one of auto, rich, plain, quiet"),
        (TrainConfig, {"checkpoint_seconds": "1"}, "checkpoint_seconds must be a number, not '1'"),
        (TrainConfig, {"device": 0}, "device must be text, not 0"),
        (DataConfig, {"mean": "0.5"}, "data.mean must be a list, not '0.5'"),
        (DataConfig, {"mean": ["a"], "std": [1.0]}, "data.mean must be a number, not 'a'"),
        (OptimizerConfig, {"betas": (0.9,)}, "optimizer.betas must be 2 values, not"),
        (ModelConfig, {"options": "depth"}, "model.options must be settings by their names, not"),
    ],
)
def test_another_type_is_refused_in_a_line(kind, given, said):
    with pytest.raises(UsageError) as error:
        kind(**given)
    assert str(error.value).startswith(said)


def test_a_run_is_trained_from_names_alone(tmp_path):
    tiny = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
    summary = train(
        TrainConfig(
            data={"limit": 100},
            model={"options": tiny},
            run=str(tmp_path / "run"),
            epochs=1,
            references=False,
            progress="quiet",
        )
    )
    assert summary["run"] == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("group", "given", "said"),
    [
        ("adversarial", {"steps": 3}, "adversarial.steps needs adversarial.eps, such as 0.0314"),
        ("adversarial", {"step": 0.1}, "adversarial.step needs adversarial.eps, such as 0.0314"),
        ("distillation", {"weight": 0.4}, "distillation.weight needs distillation.teacher, such"),
        ("distillation", {"temperature": 2.0}, "distillation.temperature needs distillation.tea"),
        ("distillation", {"features": 0.1}, "distillation.features needs distillation.teacher"),
        ("model", {"freeze_epochs": 1.0}, "model.freeze_epochs needs model.freeze, such as"),
    ],
)
def test_settings_of_what_is_off_are_refused(group, given, said):
    with pytest.raises(UsageError) as error:
        TrainConfig(**{group: given})
    assert str(error.value).startswith(said)
    switch = {
        "adversarial": {"eps": 0.1},
        "distillation": {"teacher": "t"},
        "model": {"freeze": "x"},
    }
    ((name, value),) = given.items()
    assert getattr(getattr(TrainConfig(**{group: given | switch[group]}), group), name) == value


def test_defaults_of_what_is_off_are_no_fault():
    """A recorded configuration holds all settings."""
    for group in ("adversarial", "distillation"):
        recorded = TrainConfig().to_dict()[group]
        assert getattr(TrainConfig(**{group: recorded}), group) == getattr(TrainConfig(), group)
