"""The contract of recursive models is enough: a foreign one is trained, exported and watched."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_recursive import NAME, Recurrent
from torch import nn
from torch.testing import assert_close

from smallfry.data import load_data
from smallfry.demo.page import build_page
from smallfry.demo.routes import Shown
from smallfry.demo.trace import moments_of, think
from smallfry.demo.view import show_moment
from smallfry.deploy import Manifest, Runtime
from smallfry.deploy.export import export
from smallfry.errors import Stopped
from smallfry.models import LatentRecursive, Recursive, State, ViTRM
from smallfry.models.contract import map_tensors, replace_tensors, tensors
from smallfry.models.trace import trace_recursion
from smallfry.report.recursion import recursion_trace
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from smallfry.training.evaluation import predict
from smallfry.training.exit_calibration import trace
from smallfry.training.progress import QuietReporter
from smallfry.training.run import load_run
from smallfry.training.train import resume, train

STEPS = 3


class Stop(QuietReporter):
    left = 7

    def step(self, loss, images_per_second):
        self.left -= 1
        if self.left == 0:
            raise Stopped(2, "by the test")


@pytest.fixture(scope="module")
def config():
    return TrainConfig(
        data=DataConfig(limit=400),
        model=ModelConfig(NAME, recursion_steps=STEPS),
        augment=AugmentConfig(mixup=0.0, cutmix=0.0),
        objective=ObjectiveConfig(supervision_steps=STEPS, halt_threshold=1.1),
        epochs=3,
        batch_size=32,
        threads=1,
        references=False,
        checkpoint_seconds=0.0,
        progress="quiet",
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "run"
    summary = train(replace(config, run=folder))
    assert summary["measured"]["test"]["accuracy"] > 0.4
    return folder


@pytest.fixture(scope="module")
def trained(run):
    return load_run(run)


@pytest.fixture(scope="module")
def images():
    return load_data("digits").test


def steps_of(trained, images):
    with torch.no_grad():
        return trained.model.recurse(trained.normalize(images))


def test_the_contract_is_told_by_what_a_model_offers():
    vitrm, foreign, plain = ViTRM(8, 4, 1, embed_dim=16, num_heads=2), Recurrent(), nn.Linear(2, 2)
    assert [isinstance(m, Recursive) for m in (vitrm, foreign, plain)] == [True, True, False]
    assert [isinstance(m, LatentRecursive) for m in (vitrm, foreign, plain)] == [True, False, False]


def test_states_of_any_kind_keep_it():
    one, two, three = (torch.full((2,), float(i)) for i in range(3))
    for state in (one, State(one, two), {"a": one, "b": (two, [three])}, [one, (two,)]):
        parts = tensors(state)
        doubled = map_tensors(lambda tensor: 2 * tensor, state)
        assert type(doubled) is type(state)
        assert_close(tensors(doubled), [2 * part for part in parts])
        assert_close(tensors(replace_tensors(doubled, parts)), parts)
    with pytest.raises(TypeError, match=r"expected tensors, in tuples, .*, not a int"):
        map_tensors(torch.Tensor.detach, (one, 3))


def test_deep_supervision_trains_every_step_and_natural_gradient_covers_it(run, config, tmp_path):
    rows = [row.split(",") for row in (run / "metrics.csv").read_text().splitlines()]
    last = dict(zip(rows[0], map(float, rows[-1]), strict=True))
    assert last["supervision_steps"] == STEPS
    assert 0 < last["train_halting"] < 1
    natural = replace(config, optimizer=OptimizerConfig("kfac"), run=tmp_path / "kfac")
    assert train(natural)["measured"]["test"]["accuracy"] > 0.4


def test_a_stopped_run_goes_on_to_the_bit(run, trained, config, tmp_path):
    folder = tmp_path / "parted"
    with pytest.raises(Stopped):
        train(replace(config, run=folder), Stop())
    resume(folder)
    for name, weight in load_run(folder).model.state_dict().items():
        assert torch.equal(weight, trained.model.state_dict()[name])


def test_images_leave_with_the_first_step_that_passes(trained, images):
    followed = trace(trained.model, images, trained.normalize)
    threshold = float(np.median(followed.halting[0]))
    found = predict(trained.model, images, trained.normalize, exit_threshold=threshold)
    steps = steps_of(trained, images.images)
    passing = torch.stack([step.halt_logits.sigmoid() >= threshold for step in steps])
    passing[-1] = True
    wanted = passing.int().argmax(0)
    assert_close(found.steps, wanted + 1)
    assert 1 < found.steps.double().mean() < STEPS
    logits = torch.stack([step.logits for step in steps])
    assert_close(found.logits, logits[wanted, torch.arange(len(wanted))])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("form", ["anytime", "whole"])
def test_exports_give_its_answers(run, trained, images, tmp_path, form, precision):
    runtime = Runtime(export(run, tmp_path / "export", form=form, precision=precision))
    shown = images.images[:20]
    said, last = runtime.predict(shown.numpy()), steps_of(trained, shown)[-1]
    near = {"atol": 1e-4 if precision == "float32" else 0.15, "rtol": 0}
    assert_close(torch.from_numpy(said.probabilities), last.logits.softmax(1), **near)
    assert_close(torch.from_numpy(said.halting), last.halt_logits.sigmoid(), **near)
    assert Manifest.read(tmp_path / "export").recursion_steps == STEPS
    if form == "anytime" and precision == "float32":
        first = runtime.predict(shown.numpy(), threshold=0.0)
        wanted = steps_of(trained, shown)[0].logits.softmax(1)
        assert_close(torch.from_numpy(first.probabilities), wanted, atol=1e-4, rtol=0)
        assert len(runtime.manifest.exits) > 0


@pytest.mark.parametrize("taken", [1, STEPS])
def test_the_demo_shows_a_moment_for_each_recursion_step(trained, images, taken):
    trained.model.recursion_steps, followed = taken, max(2, taken)
    try:
        trace = think(trained, images.images[0].numpy(), runs=1)
        steps = trained.model.recurse(trained.normalize(images.images[:1]), followed)
        page = str(build_page([Shown("a run", trained)]).config)
    finally:
        trained.model.recursion_steps = STEPS
    assert len(trace.moments) == followed
    assert moments_of(trained.model) == STEPS
    assert trace.answer == taken - 1
    for number, (moment, step) in enumerate(zip(trace.moments, steps, strict=True), 1):
        assert moment.recursion == number
        assert moment.probabilities == pytest.approx(step.logits[0].softmax(0).tolist(), abs=1e-6)
        assert moment.halting == pytest.approx(step.halt_logits.sigmoid().item(), abs=1e-6)
    shown = show_moment(trace, trace.answer, list("0123456789"))
    assert f"Recursion step {taken}: the model’s answer" in shown
    assert "no prediction token" in shown
    assert "latent" not in shown
    assert ("2*" in shown) == (taken == 1)
    assert "Recursion steps of" in page
    assert "latent steps" not in page


def test_its_trace_is_drawn_by_recursion_step(trained, images, tmp_path):
    some = images.images[:2]
    inputs = trained.normalize(some)
    found = trace_recursion(trained.model, inputs, STEPS)
    wanted = torch.stack([step.logits.softmax(1) for step in steps_of(trained, some)])
    assert_close(found.probabilities, wanted)
    file = tmp_path / "trace.png"
    about = {"latent_steps": None, "recursion_steps": trained.model.recursion_steps}
    recursion_trace(found, some, images.labels[:2], trained.classes, file, **about)
    assert file.stat().st_size > 1000
