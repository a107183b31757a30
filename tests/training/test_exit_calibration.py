from dataclasses import replace

import pytest
import torch

from smallfry.cli import main
from smallfry.errors import UsageError
from smallfry.training.config import ObjectiveConfig
from smallfry.training.evaluation import forward
from smallfry.training.exit_calibration import (
    Trace,
    most_accurate,
    most_thrifty,
    operating_points,
    trace,
)
from smallfry.training.train import train

# three steps, four images: one is sure and right at once, one late, one is right only at first
TRACED = Trace(
    right=torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool),
    halting=torch.tensor([[0.9, 0.2, 0.6, 0.1], [0.9, 0.7, 0.5, 0.1], [0.9, 0.9, 0.4, 0.1]]),
)


def test_points_go_from_one_step_for_all_to_all_steps():
    points = operating_points(TRACED)
    assert (points[0].accuracy, points[0].steps) == (0.5, 1.0)
    assert (points[-1].accuracy, points[-1].steps) == (0.5, 3.0)
    assert [p.steps for p in points] == sorted(p.steps for p in points)


def test_the_chosen_point_keeps_accuracy_or_cost():
    points = operating_points(TRACED)
    best = most_accurate(points, steps=2.0)
    assert best.accuracy == 0.75  # the second image waits, the third does not
    assert best.steps <= 2.0
    assert most_thrifty(points, drop=0.0).steps == 1.0
    with pytest.raises(UsageError, match="one recursion step at least"):
        most_accurate(points, steps=0.5)


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
    with pytest.raises(UsageError, match="Linear does not recur"):
        forward(linear, torch.zeros(1, 2), exit_threshold=0.5)
    with pytest.raises(UsageError, match="several recursion steps"):
        trace(linear, None, None)
