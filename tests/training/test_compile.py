import subprocess
import sys
from functools import partial

import pytest
import torch

from smallfry.errors import UsageError
from smallfry.training.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from smallfry.training.train import train


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COUNTED = """
import torch
from torch._dynamo.testing import CompileCounter

from smallfry.models import ViTRM
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.objective import Batch, DeepSupervision

counter = CompileCounter()
sizes = dict(in_chans=1, embed_dim=16, num_heads=2, mlp_hidden_dim=8, depth=2)
model, objective = ViTRM(8, 4, **sizes).train(), DeepSupervision(Classification(), 3)
prepared = objective.prepare(model)
prepared.compile(backend=counter, dynamic=True, fullgraph=True)  # no graph breaks
for size in (6, 4, 9, 6):
    labels = torch.arange(size)
    batch = Batch(torch.randn(size, 1, 8, 8), ClassTargets(labels, torch.eye(10)[labels]))
    for step in objective(prepared, batch):
        step.loss.backward()
print("graphs", counter.frame_count)
"""


@pytest.mark.slow
def test_batch_sizes_and_supervision_depths_need_no_more_than_two_graphs():
    # in a process of its own: what other tests compiled and traced would count too
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True)
    assert "graphs 2" in done.stdout, done.stderr  # from the initial state, and from a given one


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "kfac"])
def test_a_compiled_run_learns_what_an_eager_one_does(variant, monkeypatch, optimizer):
    quickly = partial(torch.compile, backend="aot_eager")  # Inductor takes half a minute
    monkeypatch.setattr("smallfry.training.loop.torch.compile", quickly)
    options = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
    model = ModelConfig(options=options, drop_rate=0.0)
    losses = [
        train(
            variant(
                model=model,
                compile=compiled,
                epochs=1,
                objective=ObjectiveConfig(supervision_steps=1),
                optimizer=OptimizerConfig(optimizer),
                run=variant().run / str(compiled),
            )
        )["measured"]["test"]["loss"]
        for compiled in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_step_that_can_not_be_compiled_is_said_to_be_so(variant, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)
    with pytest.raises(UsageError, match=r"can't compile.*compile false"):
        train(variant(compile=True, epochs=1))
