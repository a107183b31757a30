"""Callbacks: what they see, that they change nothing, and how they end a run."""

import json

import pytest
import torch
from run_helpers import StopAt, assert_same_run, metrics

from smallfry.errors import Stopped, TrainingError
from smallfry.training.callbacks import Callback
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.own_code import OwnCode
from smallfry.training.train import resume, train


class Log(Callback):
    """Records all calls, and asks for an end at some of them."""

    def __init__(self, stop_at=()):
        self.calls, self.stop_at = [], stop_at

    def _seen(self, kind, event):
        self.calls.append((kind, event))
        torch.rand(3)  # which may not change the run
        return (kind, len([1 for name, _ in self.calls if name == kind])) in self.stop_at

    def on_start(self, started):
        self._seen("start", started)

    def on_step(self, done):
        return self._seen("step", done)

    def on_epoch(self, done):
        return self._seen("epoch", done)

    def on_end(self, summary):
        self._seen("end", summary)

    def of(self, kind):
        return [event for name, event in self.calls if name == kind]


def code_of(**callbacks):
    return OwnCode(objects={f"test:{name}": each for name, each in callbacks.items()})


def test_callbacks_see_the_run_and_do_not_change_it(variant, tmp_path):
    plain, watched = variant(run=tmp_path / "plain"), variant(callbacks=["test:log"])
    train(plain)
    log = Log()
    summary = train(watched, code=code_of(log=log))
    assert_same_run(plain.run, watched.run)
    assert [kind for kind, _ in log.calls] == ["start", *[*["step"] * 6, "epoch"] * 2, "end"]
    (started,) = log.of("start")
    assert (started.folder, started.epochs, list(started.settings["callbacks"])) == (
        *(watched.run, 2),
        ["test:log"],
    )
    steps, epochs = log.of("step"), log.of("epoch")
    assert [step.step for step in steps] == [*range(1, 13)]
    assert [step.epoch for step in steps] == [1] * 6 + [2] * 6
    assert {step.steps for step in steps} == {12}
    rows = metrics(watched.run)
    assert [str(steps[i].learning_rate) for i in (5, 11)] == [r["learning_rate"] for r in rows]
    assert [str(steps[i].loss) for i in (5, 11)] == [row["train_loss"] for row in rows]
    assert all(step.images_per_second > 0 for step in steps)
    for epoch, row in zip(epochs, rows, strict=True):
        assert str(epoch.scores["validation_accuracy"]) == row["validation_accuracy"]
        assert (epoch.epochs, epoch.folder) == (2, watched.run)
    best = [epoch.epoch for epoch in epochs if epoch.is_best]
    assert best[-1] == summary["measured"]["best_epoch"]
    last = load_checkpoint(watched.run / "last").weights
    for name, weight in epochs[-1].model.state_dict().items():  # the average, which is scored
        assert torch.equal(weight, last[name]), name
    assert log.of("end") == [json.loads((watched.run / "summary.json").read_text())]


@pytest.mark.parametrize("when", [("epoch", 1), ("step", 3)], ids=lambda when: when[0])
def test_a_callback_ends_the_training_after_an_epoch(when, variant):
    config = variant(callbacks=["test:quiet", "test:log"], epochs=3)
    quiet, log = Log(), Log([when])
    summary = train(config, code=code_of(quiet=quiet, log=log))
    measured = summary["measured"]
    assert (measured["epochs"], measured["best_epoch"]) == (1, 1)
    assert measured["stopped_by"] == "test:log"
    assert len(quiet.of("step")) == 6
    assert log.of("end") == quiet.of("end") == [summary]
    again = Log()
    assert resume(config.run, code=code_of(quiet=quiet, log=again)) == summary
    assert again.calls == []  # it has ended


@pytest.mark.slow
def test_a_run_that_a_callback_ended_can_be_extended(variant):
    config = variant(callbacks=["test:log"], epochs=3)
    train(config, code=code_of(log=Log([("epoch", 2)])))
    (config.run / "summary.json").unlink()  # as if the process had been killed before
    log = Log()
    assert resume(config.run, code=code_of(log=log))["measured"]["epochs"] == 2
    assert log.of("step") == []
    summary = resume(config.run, changes={"epochs": 4}, code=code_of(log=log))
    assert summary["measured"]["epochs"] == 4
    assert "stopped_by" not in summary["measured"]
    started = log.of("start")[-1]
    assert [row["epoch"] for row in started.history[:2]] == [1, 2]


@pytest.mark.slow
def test_a_request_survives_a_stop_in_the_same_epoch(variant):
    config = variant(callbacks=["test:log"], epochs=3)
    with pytest.raises(Stopped):
        train(config, StopAt(4), code_of(log=Log([("step", 2)])))
    summary = resume(config.run, code=code_of(log=Log()))
    assert (summary["measured"]["epochs"], summary["measured"]["stopped_by"]) == (1, "test:log")


@pytest.mark.slow
def test_a_run_goes_on_without_its_callbacks(variant, tmp_path):
    whole = variant(run=tmp_path / "whole")
    train(whole)
    config = variant(callbacks=["test:log"])
    with pytest.raises(Stopped):
        train(config, StopAt(4), code_of(log=Log([("step", 2)])))
    summary = resume(config.run, changes={"callbacks": []})
    assert summary["measured"]["epochs"] == 2
    assert metrics(whole.run) == metrics(config.run)


@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_epoch", "on_end"])
def test_a_callback_that_fails_is_named(hook, variant):
    def fail(event):
        raise KeyError("nothing")

    log = Log()
    setattr(log, hook, fail)
    config = variant(callbacks=["test:log"])
    message = rf"the callback test:log failed in {hook} \(KeyError: 'nothing'\)"
    with pytest.raises(TrainingError, match=message):
        train(config, code=code_of(log=log))
    assert (config.run / "summary.json").exists() == (hook == "on_end")
