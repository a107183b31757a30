from dataclasses import replace

import pytest
import torch

from smallfry.cli import main
from smallfry.errors import UsageError
from smallfry.training.config import ObjectiveConfig
from smallfry.training.evaluation import forward
from smallfry.training.exit_calibration import trace
from smallfry.training.train import train


def test_evaluate_and_predict_take_an_early_exit(config, capsys):
    run = replace(
        config,
        model=replace(config.model, recursion_steps=3),
        objective=ObjectiveConfig(supervision_steps=3, halt_threshold=1.1),
        epochs=1,
    )
    train(run)
    capsys.readouterr()
    path = str(run.run)
    assert main(["evaluate", path, "--exit_steps", "1.5", "--json"]) == 0
    assert '"exit_threshold"' in capsys.readouterr().out
    assert main(["evaluate", path, "--exit_drop", "0.01"]) == 0
    assert "recursion steps" in capsys.readouterr().out
    assert main(["predict", path, str(run.run / "pictures"), "--exit_threshold", "0.5"]) == 0


def test_models_that_do_not_recur_have_no_early_exit():
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="Linear is not recursive"):
        forward(linear, torch.zeros(1, 2), exit_threshold=0.5)
    with pytest.raises(UsageError, match="several recursion steps"):
        trace(linear, None, None)
