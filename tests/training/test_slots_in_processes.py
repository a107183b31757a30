"""Slots of two processes: each has its own puzzles, and a stopped run resumes to the bit."""

import csv

import pytest
import torch
from two_processes import run_pair

from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.run import load_run


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_resumes_with_the_slots_of_each(tmp_path):
    run_pair("training/slots_pair.py", tmp_path)
    assert sorted(file.name for file in tmp_path.glob("stopped-*")) != []
    wanted = load_run(tmp_path / "whole", "last").model.state_dict()
    for name, weight in load_run(tmp_path / "parts", "last").model.state_dict().items():
        assert torch.equal(weight, wanted[name]), name
    losses = []
    for run in ("whole", "parts"):
        rows = list(csv.DictReader((tmp_path / run / "metrics.csv").open()))
        losses.append([row["train_loss"] for row in rows])
    assert losses[0] == losses[1]
    held = load_checkpoint(tmp_path / "whole" / "last").trainer["objective"]
    assert len(held) == 2  # of each process
    first, second = (part["carries"][0]["inputs"] for part in held)
    assert len(first) == len(second) == 4  # half of a batch
    assert not torch.equal(first, second)
