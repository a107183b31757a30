"""Experiment trackers: what they get, without their packages, and where they may write."""

import inspect
import sys
from types import SimpleNamespace

import pytest
from run_helpers import StopAt, all_metrics

from smallfry.cli import main
from smallfry.errors import SmallfryWarning, Stopped, UsageError
from smallfry.training import loggers
from smallfry.training.config import TrainConfig
from smallfry.training.loggers import TRACKERS, Tracker
from smallfry.training.train import resume, train

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_MODE")


class FakeLogger:
    """Lightning's interface of a logger."""

    made: list["FakeLogger"] = []  # noqa: RUF012  # of one test

    def __init__(self, **settings):
        self.settings, self.rows, self.ended = settings, [], None
        FakeLogger.made.append(self)

    def log_hyperparams(self, params):
        self.params = params

    def log_metrics(self, metrics, step):
        self.rows.append({"epoch": step, **metrics})

    def finalize(self, status):
        self.ended = status


@pytest.fixture
def made(monkeypatch):
    """Fake loggers, as if both packages were installed."""
    module = SimpleNamespace(MLFlowLogger=FakeLogger, WandbLogger=FakeLogger)
    monkeypatch.setitem(sys.modules, loggers.MODULE, module)
    monkeypatch.setattr(loggers, "find_spec", lambda name: name)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    FakeLogger.made.clear()
    return FakeLogger.made


def test_trackers_get_the_settings_and_every_epoch(made, variant):
    config = variant(loggers=["mlflow", "wandb"])
    summary = train(config)
    assert len(made) == 2
    for logger in made:
        assert logger.params["batch_size"] == 32
        assert logger.params["data"]["name"] == "digits"
        rows, recorded = logger.rows, all_metrics(config.run)
        assert [{k: str(v) for k, v in row.items()} for row in rows[:2]] == recorded
        test = {f"test_{name}": value for name, value in summary["measured"]["test"].items()}
        assert rows[2:] == [{"epoch": 2, **test}]
        assert logger.ended == "success"
    assert not (config.run / "mlruns").exists()


@pytest.mark.slow
def test_a_resumed_run_is_whole_in_a_tracker(made, variant):
    config = variant(loggers=["wandb"])
    with pytest.raises(Stopped):
        train(config, StopAt(8))
    resume(config.run, changes={"loggers": ["mlflow"]})
    first, second = made
    assert [row["epoch"] for row in first.rows] == [1]
    assert [row["epoch"] for row in second.rows] == [1, 2, 2]
    assert first.ended is None


def test_trackers_stay_on_this_machine_by_default(made, tmp_path, monkeypatch):
    run = tmp_path / "run"
    mlflow, wandb = TRACKERS["mlflow"](run), TRACKERS["wandb"](run)
    assert mlflow.settings == {
        "experiment_name": "smallfry",
        "run_name": "run",
        "tracking_uri": None,
        "save_dir": str(run / "mlruns"),
    }
    assert wandb.settings == {
        **{"project": "smallfry", "name": "run", "save_dir": str(run)},
        "offline": True,
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "birds")
    monkeypatch.setenv("WANDB_PROJECT", "birds")
    monkeypatch.setenv("WANDB_MODE", "online")
    mlflow, wandb = TRACKERS["mlflow"](run), TRACKERS["wandb"](run)
    assert mlflow.settings["tracking_uri"] == "http://localhost:5000"
    assert mlflow.settings["experiment_name"] == wandb.settings["project"] == "birds"
    assert not wandb.settings["offline"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert TRACKERS["wandb"](run).settings["offline"]


@pytest.mark.parametrize(("name", "kind"), [("mlflow", "MLFlowLogger"), ("wandb", "WandbLogger")])
def test_lightning_has_the_settings_that_are_given(name, kind, tmp_path, monkeypatch):
    module = pytest.importorskip(loggers.MODULE)
    parameters = inspect.signature(getattr(module, kind).__init__).parameters
    given = []
    fake = SimpleNamespace(**{kind: lambda **settings: given.extend(settings)})
    monkeypatch.setitem(sys.modules, loggers.MODULE, fake)
    TRACKERS[name](tmp_path)
    assert {*given} <= {*parameters}
    for method in ("log_hyperparams", "log_metrics", "finalize"):
        assert callable(getattr(getattr(module, kind), method))


@pytest.mark.parametrize("method", ["log_hyperparams", "log_metrics"])
def test_a_tracker_that_fails_does_not_stop_the_run(method, made, variant, monkeypatch):
    def fail(*arguments, **named):
        raise ConnectionError("no\nserver")

    monkeypatch.setattr(FakeLogger, method, fail)
    config = variant(loggers=["mlflow"])
    with pytest.warns(SmallfryWarning, match=r"mlflow: not written.*ConnectionError: no server"):
        summary = train(config)
    assert summary["measured"]["epochs"] == 2


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_named_before_anything_is_written(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"{name} is not installed: pip install {name}"):
        Tracker(name)
    run = tmp_path / "run"
    asked = ["train", "--data.limit", "50", "--run", str(run), "--loggers", f"[{name}]"]
    assert main(asked) == 2
    assert f"pip install {name}" in capsys.readouterr().err
    assert not run.exists()


def test_an_unknown_tracker_is_refused(capsys):
    with pytest.raises(UsageError, match="loggers must be one of mlflow, wandb, not 'comet'"):
        TrainConfig(loggers=["comet"])
    assert main(["train", "--loggers", "[comet]"]) == 2
    assert "loggers" in capsys.readouterr().err
