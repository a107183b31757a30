"""Experiment trackers, through Lightning's loggers."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.callbacks import Callback, Callbacks, EpochDone, Started, build_callbacks
from smallfry.training.config import TrainConfig
from smallfry.training.own_code import OwnCode

PROJECT = "smallfry"  # or the value of the tracker's own variable
MODULE = "lightning.pytorch.loggers"  # slow to import


def _mlflow(folder: Path) -> Any:
    return import_module(MODULE).MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=folder.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI"),
        save_dir=str(folder / "mlruns"),
    )


def _wandb(folder: Path) -> Any:
    return import_module(MODULE).WandbLogger(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        save_dir=str(folder),
        offline=os.environ.get("WANDB_MODE", "offline") != "online",
    )


TRACKERS: Mapping[str, Callable[[Path], Any]] = {"mlflow": _mlflow, "wandb": _wandb}


class Tracker(Callback):
    """Copy of ``metrics.csv`` in an experiment tracker, whose faults never stop a run.

    Where it writes is up to the tracker's own environment variables, and no setting: a
    configuration from someone else can't send anything anywhere.

    Args:
        name: One of ``TRACKERS``.

    Raises:
        UsageError: Its package is not installed.
    """

    def __init__(self, name: str) -> None:
        if find_spec(name) is None:
            raise UsageError(
                f"loggers: {name} is not installed: pip install {name}, or leave it out (the run "
                "folder has metrics.csv and TensorBoard's files in any case)"
            )
        self.name = name
        self._logger: Any = None

    def on_start(self, started: Started) -> None:
        """Begin, with all epochs so far."""

        def begin() -> None:
            self._logger = TRACKERS[self.name](started.folder)
            self._logger.log_hyperparams(dict(started.settings))

        self._try(begin)
        for row in started.history:
            self._write(row)

    def on_epoch(self, done: EpochDone) -> None:
        """Write the scores of an epoch."""
        self._write(done.scores)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the test scores, and end."""
        measured = summary["measured"]
        scores = {f"test_{name}": value for name, value in measured["test"].items()}
        self._write({"epoch": measured["epochs"], **scores})
        if self._logger is not None:
            self._try(lambda: self._logger.finalize("success"))

    def _write(self, row: Mapping[str, float]) -> None:
        if self._logger is not None:
            scores = {name: value for name, value in row.items() if name != "epoch"}
            self._try(lambda: self._logger.log_metrics(scores, step=int(row["epoch"])))

    def _try(self, act: Callable[[], Any]) -> None:
        """Act, or warn and end."""
        try:
            act()
        except Exception as error:  # of a server, a disk, a package
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            text = f"{self.name}: not written any more ({reason})"
            warnings.warn(text, SmallfryWarning, stacklevel=3)
            self._logger = None


def build_observers(config: TrainConfig, code: OwnCode) -> Callbacks:
    """Build the callbacks and trackers of a run; raises as ``build_callbacks`` and ``Tracker``."""
    return Callbacks({**build_callbacks(config.callbacks, code).each, **_trackers(config.loggers)})


def _trackers(names: Sequence[str]) -> dict[str, Tracker]:
    return {name: Tracker(name) for name in names}
