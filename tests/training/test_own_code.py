"""A user's own losses and metrics, and that no configuration imports any by itself."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_helpers import StopAt, metrics
from torch.testing import assert_close

import smallfry
from smallfry.cli import main
from smallfry.errors import Stopped, TrainingError, UsageError
from smallfry.tasks import create_task
from smallfry.training.callbacks import build_callbacks
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import (
    BalanceConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.own_code import OwnCode, load_code, take_objects
from smallfry.training.own_task import OwnClassification, with_own
from smallfry.training.train import resume, train

FILE = Path(__file__).with_name("own_code.py")
TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}


@pytest.fixture(scope="module")
def code():
    return load_code([FILE])


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module on Python's path, and the file that is there once it has been imported."""
    mark = tmp_path / "imported"
    (tmp_path / "evil_code.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "def loss(logits, targets): return logits.sum()\n"
        "class Watch:\n    def on_end(self, summary): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield mark
    sys.modules.pop("evil_code", None)


# What is found


def test_code_is_found_by_its_import_path(code):
    module = sys.modules["own_code"]
    assert code.find("own_code:cross_entropy", "objective.loss") is module.cross_entropy
    assert code.find("own_code:recorder", "callbacks") is module.recorder
    assert load_code([str(FILE)]).modules["own_code"] is module  # imported once
    assert load_code(["smallfry.order"]).modules["smallfry.order"].__name__ == "smallfry.order"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_code:cros_entropy", "defines no 'cros_entropy'; did you mean 'cross_entropy'"),
        ("own_code:imported_function", "defines no 'imported_function'"),  # another module's
        ("own_code:subprocess", "defines no 'subprocess'"),
        ("own_code:F", "defines no 'F'"),
        ("own_code:WIDTH", "defines no 'WIDTH'"),
        ("own_code:recorder.on_epoch", "defines no 'recorder.on_epoch'"),
        ("os:system", "not imported because a configuration names it: add --code os.py"),
        ("a.b:f", "add --code b.py"),
    ],
)
def test_only_what_a_named_module_defines_is_found(code, path, message):
    with pytest.raises(UsageError, match=message) as caught:
        code.find(path, "objective.loss")
    assert str(caught.value).startswith("objective.loss")


def test_code_that_cannot_be_imported_is_explained(tmp_path):
    (tmp_path / "halved.py").write_text("1 / 0")
    with pytest.raises(UsageError, match=r"halved.py can't be imported \(ZeroDivisionError"):
        load_code([tmp_path / "halved.py"])
    assert "halved" not in sys.modules
    with pytest.raises(UsageError, match="there is no such file"):
        load_code([tmp_path / "absent.py"])
    with pytest.raises(UsageError, match="absent_module can't be imported"):
        load_code(["absent_module"])
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UsageError, match="another module has the name json"):
        load_code([tmp_path / "json.py"])
    assert sys.modules["json"] is json


@pytest.mark.parametrize("path", ["focal", "a:", ":b", "a:b:c", ""])
def test_an_import_path_has_a_module_and_a_name(path):
    for make in (
        lambda: ObjectiveConfig(loss=path),
        lambda: TrainConfig(metrics=[path]),
        lambda: TrainConfig(callbacks=[path]),
    ):
        with pytest.raises(UsageError, match="expected MODULE:NAME"):
            make()


def test_objects_of_a_program_are_named(code):
    module = sys.modules["own_code"]
    one, two = module.Recorder(), module.Recorder()
    settings = {"callbacks": [one, two, one, "own_code:Recorder"], "metrics": [module.right]}
    settings |= {"objective": {"loss": module.cross_entropy}, "epochs": 2}
    plain, found = take_objects(settings, str(FILE))
    first, second = "own_code:Recorder", "own_code:Recorder-2"
    assert plain["callbacks"] == [first, second, first, first]
    assert found.find(first, "callbacks") is one
    assert found.find(second, "callbacks") is two
    assert plain["objective"] == {"loss": "own_code:cross_entropy"}
    assert found.find("own_code:cross_entropy", "") is module.cross_entropy
    assert found.find("own_code:broken", "") is module.broken  # of the file
    assert plain["epochs"] == 2
    assert take_objects({}, code) == ({}, code)


# Configurations import nothing


def test_no_configuration_imports_code(evil, tmp_path, capsys):
    settings = "callbacks: [evil_code:Watch]\nobjective: {loss: evil_code:loss}\n"
    Path("config.yaml").write_text(settings)
    assert main(["train", "--config", "config.yaml", "--run", "new"]) == 2
    assert "evil_code:loss, which is not imported" in capsys.readouterr().err
    Path("config.yaml").write_text(settings + "code: [evil_code]\n")
    assert main(["train", "--config", "config.yaml", "--run", "new"]) == 2
    Path("config.yaml").write_text("code: evil_code\n")
    for more in ([], ["--code", str(FILE)]):
        assert main(["train", *more, "--config", "config.yaml", "--run", "new"]) == 2
        assert "code can't be set in a file" in capsys.readouterr().err
    assert not evil.exists()
    assert not Path("new").exists()


def test_a_run_of_someone_else_imports_no_code(evil, config, capsys):
    with pytest.raises(Stopped):
        train(config, StopAt(1))
    file = config.run / "config.yaml"
    for setting in ("callbacks: [evil_code:Watch]", "metrics: [evil_code:f]"):
        name = setting.partition(":")[0]
        file.write_text(file.read_text().replace(f"{name}: []", setting))
        assert main(["train", "--resume", str(config.run)]) == 2
        assert "names evil_code:" in capsys.readouterr().err
        file.write_text(file.read_text().replace(setting, f"{name}: []"))
    text = file.read_text().replace("  label_smoothing: 0.0", "  loss: evil_code:loss")
    file.write_text(text)
    assert main(["train", "--resume", str(config.run)]) == 2
    assert "objective.loss names evil_code:loss" in capsys.readouterr().err
    assert main(["evaluate", str(config.run), "--checkpoint", "last"]) == 0
    assert not evil.exists()
    file.write_text(text.replace("callbacks: []", "callbacks: [evil_code:Watch]"))
    asked = ["train", "--resume", str(config.run), "--code", "evil_code.py"]
    assert main(asked) == 0
    assert evil.exists()


# Losses


@pytest.mark.slow
def test_a_loss_of_a_user_trains_as_the_same_loss_of_ours(code, variant, tmp_path):
    name = "cross_entropy"
    plain = train(variant(run=tmp_path / "plain"))
    objective = ObjectiveConfig(supervision_steps=2, loss=f"own_code:{name}")
    own = train(variant(objective=objective, run=tmp_path / "own"), code=code)
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "own"), strict=True):
        assert float(one["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-4)
    assert own["own_code"] == {"loss": f"own_code:{name}"}
    assert "own_code" not in plain
    assert read_config(tmp_path / "own" / "config.yaml").objective.loss == f"own_code:{name}"


def test_smoothed_targets_are_those_of_cross_entropy(code):
    logits, shares = torch.randn(5, 4), torch.rand(5, 4).softmax(1)
    config = TrainConfig(
        objective=ObjectiveConfig(label_smoothing=0.2, loss="own_code:cross_entropy")
    )
    plain = OwnClassification(0.2)
    own = with_own(plain, config, code)
    mean = replace(own, own_loss=code.find("own_code:mean_cross_entropy", ""))
    targets = own.targets(torch.zeros(5), shares)
    expected = plain.loss(logits.requires_grad_(), targets)
    assert_close(own.loss(logits, targets), expected)
    assert_close(mean.loss(logits, targets), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("detached", "must depend on the logits"),
        ("of_another_shape", r"\(5,\) or their mean \(\), not \(5, 4\)"),
        ("no_tensor", "not float"),
    ],
)
def test_a_loss_of_another_form_is_refused(name, message, code):
    config = TrainConfig(objective=ObjectiveConfig(loss=f"own_code:{name}"))
    task = with_own(OwnClassification(), config, code)
    targets = task.targets(torch.zeros(5), torch.ones(5, 4))
    with pytest.raises(UsageError, match=message):
        task.loss(torch.randn(5, 4, requires_grad=True), targets)


def test_settings_that_a_loss_does_not_go_with_are_refused(code, variant):
    loss = ObjectiveConfig(loss="own_code:cross_entropy")
    for changes, message in (
        ({"optimizer": OptimizerConfig("kfac")}, "optimizer.name kfac needs a likelihood"),
        ({"balance": BalanceConfig(loss="balanced")}, "weigh cross-entropy"),
        ({"objective": replace(loss, name="bias")}, "bias has its own loss"),
        ({"objective": ObjectiveConfig(loss="own_code:Recorder")}, "is not a function"),
    ):
        config = variant(**{"objective": loss, **changes})
        with pytest.raises(UsageError, match=message):
            train(config, code=code)
        assert not config.run.exists()


def test_own_code_is_for_classification(code):
    task = create_task("puzzle")
    with pytest.raises(UsageError, match="metrics is for classification, not puzzle"):
        with_own(task, TrainConfig(metrics=["own_code:right"]), code)
    assert with_own(task, TrainConfig(), code) is task


# Metrics


def test_a_metric_of_a_user_is_recorded_and_chooses_the_epoch(code, variant, tmp_path):
    config = variant(metrics=["own_code:right", "own_code:wrong_error"], select_by="wrong_error")
    summary = train(config, code=code)
    rows = metrics(config.run)
    for row in rows:
        assert float(row["validation_right"]) == pytest.approx(float(row["validation_accuracy"]))
    errors = [float(row["validation_wrong_error"]) for row in rows]
    assert errors[summary["measured"]["best_epoch"] - 1] == min(errors)
    test = summary["measured"]["test"]
    assert test["right"] == pytest.approx(1 - test["wrong_error"])
    assert test["right"] == pytest.approx(test["accuracy"])


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["own_code:accuracy"], UsageError, "the name of another score"),
        (["own_code:right", "own_code:right"], UsageError, "the name of another score"),
        (["own_code:recorder"], UsageError, "is not a function"),
        (["own_code:broken"], TrainingError, r"the metric broken failed \(ZeroDivisionError"),
    ],
)
def test_a_metric_that_cannot_be_used_is_named(names, error, message, code, variant):
    with pytest.raises(error, match=message):
        train(variant(metrics=names), code=code)


# Python, and resuming


def test_functions_are_given_in_python(tmp_path):
    module = sys.modules.get("own_code") or load_code([FILE]).modules["own_code"]
    run = smallfry.train(
        data={"name": "digits", "limit": 100},
        model={"options": TINY},
        objective={"loss": module.cross_entropy},
        metrics=[module.right],
        epochs=1,
        references=False,
        progress="quiet",
        run=tmp_path / "run",
    )
    assert run["own_code"] == {"loss": "own_code:cross_entropy", "metrics": ["own_code:right"]}
    assert "validation_right" in metrics(tmp_path / "run")[0]


@pytest.mark.slow
def test_a_run_with_own_code_resumes_exactly(code, variant, tmp_path):
    settings = {
        "objective": ObjectiveConfig(supervision_steps=2, loss="own_code:cross_entropy"),
        "metrics": ["own_code:right"],
    }
    whole, parts = variant(run=tmp_path / "whole", **settings), variant(**settings)
    train(whole, code=code)
    with pytest.raises(Stopped):
        train(parts, StopAt(8), code)
    with pytest.raises(UsageError, match=r"objective\.loss names own_code"):
        resume(parts.run)
    resume(parts.run, code=code)
    assert metrics(whole.run) == metrics(parts.run)
    one, other = (load_checkpoint(run / "last").weights for run in (whole.run, parts.run))
    assert all(torch.equal(one[name], other[name]) for name in one)


# Callbacks that can't be


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Misspelt", "has a method 'on_epoch_end'; did you mean 'on_epoch'"),
        ("Hookless", "has none of on_start, on_step, on_epoch, on_end"),
        ("Unmakeable", "can't be made .TypeError"),
        ("right", "has none of"),
    ],
)
def test_something_else_than_a_callback_is_refused(name, message, code):
    with pytest.raises(UsageError, match=message):
        build_callbacks([f"own_code:{name}"], code)


def test_a_callback_is_made_once_and_named_once(code):
    module = sys.modules["own_code"]
    before = module.CALLED.count("made")
    built = build_callbacks(["own_code:Recorder", "own_code:recorder"], code)
    assert module.CALLED.count("made") == before + 1
    assert built.each["own_code:recorder"] is module.recorder
    with pytest.raises(UsageError, match="twice"):
        build_callbacks(["own_code:recorder"] * 2, code)
    assert build_callbacks([], OwnCode()).each == {}
