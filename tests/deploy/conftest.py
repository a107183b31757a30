from pathlib import Path

import pytest

from smallfry.training.config import DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from smallfry.training.train import train

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
STEPS = 3


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of a recursive model of three steps, trained for two seconds on digits."""
    folder = tmp_path_factory.mktemp("runs") / "recursive"
    train(
        TrainConfig(
            data=DataConfig(limit=400),
            model=ModelConfig(options=TINY, recursion_steps=STEPS),
            objective=ObjectiveConfig(supervision_steps=STEPS, halt_threshold=1.1),
            epochs=2,
            threads=1,
            references=False,
            run=folder,
            progress="quiet",
        )
    )
    return folder


@pytest.fixture(scope="session")
def anytime(run, tmp_path_factory) -> Path:
    """That model, exported in parts."""
    from smallfry.deploy.export import export

    return export(run, tmp_path_factory.mktemp("exports") / "anytime")


@pytest.fixture(scope="session")
def whole(run, tmp_path_factory) -> Path:
    """That model, exported as one graph."""
    from smallfry.deploy.export import export

    return export(run, tmp_path_factory.mktemp("exports") / "whole", form="whole")


@pytest.fixture(scope="session")
def int8(run, whole, tmp_path_factory) -> Path:
    """That model, as one graph of eight-bit products, made of the graph that has been traced."""
    from smallfry.deploy import export as exporting

    graphs = {"model": (whole / "model.onnx").read_bytes()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "trace_graphs", lambda *_: graphs)
        folder = tmp_path_factory.mktemp("exports") / "int8"
        return exporting.export(run, folder, "whole", "int8")
