"""A task is one file: a throw-away regression trains, is scored, resumed and preconditioned."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from smallfry.cli import main
from smallfry.data import load_data
from smallfry.demo.serve import serving
from smallfry.deploy.export import export
from smallfry.deploy.pretrained import save_pretrained
from smallfry.errors import Stopped, UsageError
from smallfry.models.contract import map_tensors
from smallfry.optim import KFAC
from smallfry.tasks import Batch, Pictured, find_task, register, task_names
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training import optimization
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from smallfry.training.evaluation import forward, predict, score, task_of
from smallfry.training.inference import classify
from smallfry.training.progress import QuietReporter
from smallfry.training.run import RunFolder, load_run
from smallfry.training.train import resume, train
from smallfry_runtime.runtime import Runtime

LIMIT = 800  # images
TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}


def value_of(digits):
    return (digits[:, None] - 4.5) / 3


@register
@dataclass(frozen=True)
class Size:
    """The digit as a number from -1.5 to 1.5; a mixed image is worth what its parts are."""

    name: ClassVar[str] = "size_of_a_digit"
    likelihood: ClassVar[str] = "gaussian"

    def outputs(self, classes):
        return 1

    def targets(self, labels, shares):
        return {"value": shares @ value_of(torch.arange(shares.shape[1], device=shares.device))}

    def loss(self, outputs, targets):
        return F.mse_loss(outputs, targets["value"]) / 2

    def right(self, outputs, targets):
        return (outputs - targets["value"]).abs()[:, 0] < 0.5

    def metrics(self, outputs, labels):
        value = value_of(labels)
        loss, accuracy = self.loss(outputs, {"value": value}), self.right(outputs, {"value": value})
        explained = 1 - 2 * loss / value.var(unbiased=False)
        return {
            "loss": loss.item(),
            "accuracy": accuracy.float().mean().item(),
            "explained": explained.item(),
        }

    def rank(self, scores):
        return (scores["explained"],)

    def decode(self, outputs, classes, settings=None):
        return outputs[:, 0].tolist()


class Stop(QuietReporter):
    left = 9

    def step(self, loss, images_per_second):
        self.left -= 1
        if self.left == 0:
            raise Stopped(2, "by the test")


@pytest.fixture(scope="module")
def config():
    return TrainConfig(
        data=DataConfig(limit=LIMIT),
        model=ModelConfig(options=TINY, drop_rate=0.1, recursion_steps=2),
        augment=AugmentConfig(mixup=0.2, cutmix=0.0),
        task=Size.name,
        objective=ObjectiveConfig(supervision_steps=2, halt_threshold=1.1),
        ema=EMAConfig(0.9),
        epochs=8,
        batch_size=32,
        threads=1,
        checkpoint_seconds=0.0,
        progress="quiet",
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("regression") / "run"
    train(replace(config, run=folder, checkpoint_seconds=1000.0))
    return folder


@pytest.fixture(scope="module")
def short_run(config, tmp_path_factory):
    """A run of which no test asks what it has learned."""
    folder = tmp_path_factory.mktemp("regression") / "short"
    train(replace(config, data=DataConfig(limit=100), epochs=1, run=folder))
    return folder


@pytest.mark.slow
def test_it_trains_and_is_scored_as_the_task_says(run):
    folder = RunFolder(run)
    summary, trained, data = folder.read_summary(), load_run(run), load_data("digits", limit=LIMIT)
    assert trained.model.num_classes == 1
    assert task_of(trained.manifest) == Size()
    measured = summary["measured"]
    assert measured["test"]["explained"] > 0.2
    assert measured["references"] == []
    found = predict(trained.model, data.test, trained.normalize)
    assert found.logits.shape == (len(data.test), 1)
    scores = score(found, Size())
    assert scores == pytest.approx(measured["test"], abs=1e-5)
    assert list(scores) == ["loss", "accuracy", "explained", "halting"]
    wanted = F.mse_loss(found.logits, value_of(data.test.labels)).item() / 2
    assert scores["loss"] == pytest.approx(wanted)
    rows = folder.read_metrics()
    best = max(rows, key=lambda row: row["validation_explained"])
    assert measured["best_epoch"] == best["epoch"]
    assert 0 < rows[-1]["train_accuracy"] < 1


@pytest.mark.slow
def test_the_command_prints_its_scores_and_compresses_it(run, tmp_path, capsys):
    wanted = RunFolder(run).read_summary()["measured"]["test"]
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["explained"] == pytest.approx(wanted["explained"], abs=1e-5)
    assert main(["train", "--resume", str(run)]) == 0  # which has ended
    assert f"{wanted['explained']:.4g}" in capsys.readouterr().out
    methods = ["--methods", "[round_weights]"]
    assert main(["compress", str(run), "--to", str(tmp_path / "small"), *methods, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert {*compared["accuracy"]} == {"before", "after"}
    assert compared["agreement"] is None  # which is of classes
    assert main(["evaluate", str(tmp_path / "small"), "--json"]) == 0
    small = json.loads(capsys.readouterr().out)
    assert small["explained"] == pytest.approx(wanted["explained"], abs=0.05)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit(run, config, tmp_path):
    with pytest.raises(Stopped):
        train(replace(config, run=tmp_path / "parted"), Stop())
    summary = resume(tmp_path / "parted")
    wanted = RunFolder(run).read_summary()
    assert summary["measured"]["test"] == wanted["measured"]["test"]
    for checkpoint in ("best", "last"):
        weights = load_run(run, checkpoint).model.state_dict()
        for name, weight in load_run(tmp_path / "parted", checkpoint).model.state_dict().items():
            assert torch.equal(weight, weights[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deep_supervision", "cross_entropy"])
def test_natural_gradient_takes_its_likelihood(config, tmp_path, monkeypatch, name):
    given = []

    def kfac(*arguments, **settings):
        given.append(settings["likelihood"])
        return KFAC(*arguments, **settings)

    monkeypatch.setitem(optimization.NATURAL, "kfac", kfac)
    objective = ObjectiveConfig(name)
    if name == "deep_supervision":
        objective = replace(config.objective, name=name)
    optimizer = OptimizerConfig("kfac")
    summary = train(replace(config, optimizer=optimizer, objective=objective, run=tmp_path / "run"))
    both = {"logits": "gaussian", "halt_logits": "bernoulli"}
    assert given == [both if name == "deep_supervision" else "gaussian"]
    assert summary["measured"]["test"]["explained"] > 0.2


def test_what_serves_classifiers_alone_refuses_it(short_run, tmp_path):
    with pytest.raises(UsageError, match="for size_of_a_digit, and its answers are not classes"):
        save_pretrained(short_run, tmp_path / "shared")
    with pytest.raises(UsageError, match="its answers are not classes"):
        list(classify(load_run(short_run), []))
    with pytest.raises(UsageError, match="its answers are not classes"), serving([str(short_run)]):
        pass


def test_its_outputs_are_exported_and_its_decoder_is_its_own(short_run, tmp_path):
    trained = load_run(short_run)
    runtime = Runtime(export(short_run, tmp_path / "export", form="whole"))
    assert runtime.manifest.task == "size_of_a_digit"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), np.uint8)
    wanted = forward(trained.model, trained.normalize(torch.from_numpy(pixels)))[0]
    assert_close(
        torch.from_numpy(runtime.compute(pixels).logits), wanted.detach(), atol=1e-4, rtol=0
    )
    assert trained.decode(pixels) == Size().decode(wanted, trained.classes)
    with pytest.raises(UsageError, match="no decoder for the task 'size_of_a_digit'; there are"):
        runtime.decode(pixels)
    for ask in (runtime.predict, lambda pixels: list(runtime.classify([]))):
        with pytest.raises(UsageError, match="for size_of_a_digit, and its answers are not"):
            ask(pixels)


def test_only_its_own_pictures_are_drawn(config, tmp_path, pictures_drawn):
    train(replace(config, data=DataConfig(limit=100), epochs=1, run=tmp_path / "run"))
    assert not isinstance(Size(), Pictured)
    assert [file.name for file in (tmp_path / "run/pictures").iterdir()] == ["learning_curves.png"]


def test_tasks_are_found_by_name(config, tmp_path):
    assert {"classification", Size.name} <= {*task_names()}
    assert find_task("classification") is Classification
    assert isinstance(Classification(), Pictured)
    assert task_of({}) == Classification()
    with pytest.raises(UsageError, match=r"unknown task 'clasification'.*classification"):
        train(replace(config, task="clasification", run=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    smooth = replace(config.objective, label_smoothing=0.1)
    with pytest.raises(UsageError, match="size_of_a_digit has no label smoothing: leave out"):
        train(replace(config, objective=smooth, run=tmp_path / "run"))
    with pytest.raises(UsageError, match="two tasks are named 'classification'"):
        register(type("Other", (), {"name": "classification"}))


def test_classification_learns_shares_and_counts_labels():
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    targets = ClassTargets(torch.tensor([0, 0]), torch.tensor([[1.0, 0.0], [0.3, 0.7]]))
    task = Classification(label_smoothing=0.2)
    smooth = 0.8 * targets.shares + 0.1
    wanted = -(smooth * outputs.log_softmax(1)).sum(1).mean()
    assert_close(task.loss(outputs, targets), wanted)
    assert task.right(outputs, targets).tolist() == [True, False]
    assert task.rank({"accuracy": 0.5, "loss": 2.0}) > task.rank({"accuracy": 0.5, "loss": 3.0})
    assert_close(torch.tensor(task.decode(outputs, "abc")), outputs.softmax(1))


def test_batches_are_split_whatever_their_targets_are():
    batch = Batch(torch.arange(7), ClassTargets(torch.arange(7), torch.eye(7)))
    parts = batch.split(3)
    assert [len(part.inputs) for part in parts] == [3, 3, 1]
    assert all(isinstance(part.targets, ClassTargets) for part in parts)
    assert_close(torch.cat([part.targets.shares for part in parts]), torch.eye(7))
    moved = batch.to(torch.device("meta"))
    assert {moved.inputs.device.type, moved.targets.shares.device.type} == {"meta"}
    with pytest.raises(TypeError, match="expected tensors"):
        map_tensors(torch.clone, {"words": "text"})
