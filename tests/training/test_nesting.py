"""Runs that train nested sub-models."""

import copy

import pytest
from run_helpers import StopAt, assert_same_run

from smallfry.errors import Stopped
from smallfry.training.run import load_run
from smallfry.training.train import resume, train
from smallfry.transforms.nested import SubModel, extract, nest_of

NET = {"methods": [{"sorted_net": {"widths": [0.5, 1.0], "latent_steps": [1]}}]}
OPTIONS = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 2}


def test_a_run_stopped_in_between_resumes_to_the_bit(variant, config, tmp_path):
    model = copy.deepcopy(config.model)
    object.__setattr__(model, "options", OPTIONS)
    whole, parted = (variant(run=tmp_path / n, model=model, **NET) for n in ("whole", "parted"))
    train(whole)
    with pytest.raises(Stopped):
        train(parted, StopAt(7))
    resume(parted.run)
    assert_same_run(whole.run, parted.run)
    trained = load_run(whole.run)
    assert [str(s) for s in nest_of(trained.model).nested.submodels] == [
        *("full", "latent_steps 1", "width 0.5", "width 0.5, latent_steps 1")
    ]
    again, _ = extract(trained.model, SubModel(width=0.5, latent_steps=1))
    assert again.blocks[0].mlp.fc2.in_features == 8
