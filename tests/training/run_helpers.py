"""What several tests of whole runs share."""

import csv
import os
import signal

import torch

from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.progress import QuietReporter

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
TIMINGS = ("images_per_second", "seconds")


class StopAt(QuietReporter):
    """Sends this process a signal after some steps."""

    def __init__(self, step, number=signal.SIGINT):
        self.left, self.number = step, number

    def step(self, loss, images_per_second):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def metrics(run):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in all_metrics(run)]


def all_metrics(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    for checkpoint in ("last", "best"):
        first, second = load_checkpoint(one / checkpoint), load_checkpoint(other / checkpoint)
        assert first.weights.keys() == second.weights.keys()
        for name, weight in first.weights.items():
            assert torch.equal(weight, second.weights[name]), name
    first, second = (load_checkpoint(run / "last").trainer for run in (one, other))
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
