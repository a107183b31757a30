from dataclasses import replace

import pytest

from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)
from smallfry.training.train import train

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}


def settings(run):
    return TrainConfig(
        data=DataConfig(limit=200),
        model=ModelConfig(options=TINY, drop_rate=0.1),
        augment=AugmentConfig(crop_padding=1, flip=True, mixup=0.2, cutmix=1.0),
        objective=ObjectiveConfig(supervision_steps=2),
        epochs=2,
        batch_size=32,
        threads=1,
        checkpoint_seconds=1000.0,
        references=False,
        run=run,
        progress="quiet",
    )


@pytest.fixture
def config(tmp_path):
    """A run of a second: 2 epochs of 6 steps, with everything random that there is."""
    return settings(tmp_path / "run")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """That run, undisturbed, which tests only read."""
    folder = tmp_path_factory.mktemp("undisturbed") / "whole"
    train(settings(folder))
    return folder


@pytest.fixture
def variant(config):
    """The same run with other settings."""
    return lambda **changes: replace(config, **changes)
