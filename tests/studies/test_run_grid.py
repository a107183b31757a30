"""Grids of training runs: made once, gone on with, and not stopped by one that fails."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smallfry.errors import RunError, Stopped, UsageError
from smallfry.studies import grid, progress
from smallfry.studies.folder import locked, stoppable
from smallfry.studies.grid import run_grid
from smallfry.studies.grid_progress import GridProgress, RunReporter
from smallfry.studies.recipes import Planned
from smallfry.training.checkpoint import saved_position
from smallfry.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.run import RunFolder

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
CONFIG = TrainConfig(
    data=DataConfig(limit=100),
    model=ModelConfig("vitrm_micro_patch4_8", options=TINY),
    epochs=2,
    batch_size=32,
    device="cpu",
    references=False,
    progress="quiet",
)


def planned(*seeds: int, **changes: Any) -> list[Planned]:
    told = replace(CONFIG, **changes)
    return [Planned(f"s{seed}", {"seed": seed}, replace(told, seed=seed)) for seed in seeds]


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    rows = RunFolder(folder / "runs" / name).read_metrics()
    timings = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timings} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that the tests only read."""
    folder = tmp_path_factory.mktemp("whole")
    run_grid("toy", planned(0, 1), folder)
    return folder


def test_each_run_is_an_ordinary_one_in_a_folder_of_its_own(whole: Path) -> None:
    outcomes = run_grid("toy", planned(0, 1), whole)
    assert [outcome.name for outcome in outcomes] == ["s0", "s1"]
    for outcome in outcomes:
        assert (whole / "runs" / outcome.name / "best" / "model.safetensors").exists()
        assert outcome.summary is not None
        assert outcome.test == 100 * outcome.summary["measured"]["test"]["accuracy"]
        best = outcome.history[outcome.measured("best_epoch") - 1]
        assert outcome.selected == 100 * best["validation_accuracy"]


def test_what_has_ended_is_not_made_again_and_more_can_be_asked_for(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(grid, "train", lambda config, reporter: made.append(config.run))
    run_grid("toy", planned(0, 1), whole)
    assert made == []
    assert "all 2 runs have ended" in capsys.readouterr().out
    with pytest.raises(AssertionError):  # as the stand-in leaves no summary
        run_grid("toy", planned(0, 1, 2), whole)
    assert made == [whole / "runs" / "s2"]
    assert "3 runs, 2 have ended; 2 epochs to go" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_study_goes_on_where_it_was(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    with monkeypatch.context() as patch:
        epoch = RunReporter.epoch

        def stop(self: RunReporter, *told: Any) -> None:
            epoch(self, *told)
            if self.plan.name == "s1":
                os.kill(os.getpid(), number)

        patch.setattr(RunReporter, "epoch", stop)
        with pytest.raises(Stopped, match="the same command goes on") as stopped:
            run_grid("toy", planned(0, 1), tmp_path)
    assert stopped.value.signal_number == number
    assert len(metrics(tmp_path, "s1")) == 1
    run_grid("toy", planned(0, 1), tmp_path)
    for name in ("s0", "s1"):
        assert metrics(tmp_path, name) == metrics(whole, name)


@pytest.mark.slow
def test_a_restarted_study_counts_the_epochs_that_are_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch = RunReporter.epoch

    def stop(self: RunReporter, *told: Any) -> None:
        epoch(self, *told)
        if told[0]["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    plans = planned(0, 1, epochs=5)
    with monkeypatch.context() as patch:
        patch.setattr(RunReporter, "epoch", stop)
        with pytest.raises(Stopped):
            run_grid("toy", plans, tmp_path)
    assert "2 runs, 0 have ended; 10 epochs to go\ns0, epoch 0/5\n" in capsys.readouterr().out
    assert GridProgress(plans, {}, {"s0": 3.0})._left([({"seed": 0}, 10.0)]) == 70.0
    run_grid("toy", plans, tmp_path)
    said = capsys.readouterr().out
    assert "2 runs, 0 have ended; 7 epochs to go\ns0, epoch 3/5\n" in said
    assert "\ns1, epoch 0/5\n" in said


def test_a_run_that_is_killed_goes_on_where_it_had_its_best_epoch(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even before ``checkpoint_seconds`` have passed for the first time."""

    class Killed(BaseException):
        pass

    def kill(self: RunReporter, loss: float, *_: Any) -> None:
        if (tmp_path / "runs" / "s0" / "best").exists():
            raise Killed  # which saves nothing

    with monkeypatch.context() as patch:
        patch.setattr(RunReporter, "step", kill)
        with pytest.raises(Killed):
            run_grid("toy", planned(0), tmp_path)
    position = saved_position(tmp_path / "runs" / "s0" / "last")
    assert position is not None
    assert position["epoch"] == 1
    run_grid("toy", planned(0), tmp_path)
    assert metrics(tmp_path, "s0") == metrics(whole, "s0")


def test_a_log_shows_a_study_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside of a terminal a line comes now and then, though no epoch ends."""
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.01)
    lines: list[str] = []

    def wait(self: RunReporter, *_: Any) -> None:
        self._done += 1
        while self._done == 2 and "step 2 of" not in "".join(lines):
            lines.append(capsys.readouterr().out)

    monkeypatch.setattr(RunReporter, "step", wait)
    run_grid("toy", planned(0, epochs=1), tmp_path)
    assert "s0, epoch 0/1; step 2 of 3\n" in "".join(lines)


def test_in_a_terminal_a_bar_moves_instead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with GridProgress(planned(0), {}) as shown:
        shown.begin(shown.waiting[0])
        assert not shown.heart._thread.is_alive()
    assert "epoch 0/2" not in capsys.readouterr().out


def test_a_run_that_diverges_is_noted_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = planned(7, optimizer=OptimizerConfig("sgd", 1e30, clip=None))
    plans = [*wild, *planned(0, epochs=1)]
    failed, done = run_grid("toy", plans, tmp_path)
    assert failed.failure is not None
    assert "not a finite number" in failed.failure
    assert failed.summary is None
    assert done.failure is None
    assert "1/2  s7: failed: step" in capsys.readouterr().out
    assert run_grid("toy", plans, tmp_path)[0] == failed
    assert "all 2 runs have ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of memory: CUDA out of"),
        (MemoryError(), "out of memory: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 GB"), "out of memory: Def"),
        (torch.linalg.LinAlgError("not positive definite"), "not positive definite"),
    ],
)
def test_a_failure_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(config: TrainConfig, reporter: Any) -> None:
        raise error

    monkeypatch.setattr(grid, "train", fail)
    (outcome,) = run_grid("toy", planned(0), tmp_path)
    assert str(outcome.failure).startswith(said)
    assert "\n" not in str(outcome.failure)


def test_a_full_disk_is_no_result_and_stops_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: TrainConfig, reporter: Any) -> None:
        raise RunError("no space is left")

    monkeypatch.setattr(grid, "train", fail)
    with pytest.raises(RunError):
        run_grid("toy", planned(0), tmp_path)
    assert not (tmp_path / "runs" / "s0" / "failure.json").exists()


def test_other_settings_or_another_study_need_another_folder(whole: Path) -> None:
    with pytest.raises(UsageError, match="have epochs 2, not 3: use the same"):
        run_grid("toy", planned(0, epochs=3), whole)
    with pytest.raises(UsageError, match=r"data\.limit 100, not 50"):
        run_grid("toy", planned(0, data=DataConfig(limit=50)), whole)
    with pytest.raises(UsageError, match="holds the study toy"):
        run_grid("game", planned(0), whole)


def test_a_folder_says_nothing_of_where_data_and_runs_are(whole: Path) -> None:
    told = json.loads((whole / "study.json").read_text())["runs"]["s0"]
    assert told["data.limit"] == 100
    assert not {"run", "data.root", "progress"} & set(told)
    assert str(whole) not in (whole / "study.json").read_text()


def test_a_study_of_an_earlier_version_has_the_defaults_of_later_settings(
    whole: Path, tmp_path: Path
) -> None:
    told = json.loads((whole / "study.json").read_text())
    del told["runs"]["s0"]["data.remove_duplicates"]
    before = json.dumps(told)
    (tmp_path / "study.json").write_text(before)
    grid.claim("toy", planned(0), tmp_path)
    data = replace(CONFIG.data, remove_duplicates=True)
    with pytest.raises(UsageError, match=r"have data\.remove_duplicates False, not True"):
        grid.claim("toy", planned(0, data=data), tmp_path)


def test_an_interrupted_run_follows_its_data_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots: list[Path | None] = []

    def stop(path: Path, *_: Any) -> None:
        roots.append(read_config(path / "config.yaml").data.root)
        raise Stopped(signal.SIGTERM, "enough")

    def begin(config: TrainConfig, *_: Any) -> None:
        RunFolder(config.run or tmp_path).begin(config.to_dict())
        stop(config.run or tmp_path)

    monkeypatch.setattr(grid, "train", begin)
    monkeypatch.setattr(grid, "resume", stop)
    wanted = [tmp_path / "old", tmp_path / "new", None]
    for root in wanted:
        (tmp_path / "runs" / "s0").mkdir(parents=True, exist_ok=True)
        with pytest.raises(Stopped):
            run_grid("toy", planned(0, data=DataConfig("cifar10", root)), tmp_path)
    assert roots == [tmp_path / "old", tmp_path / "new", tmp_path / "new"]


def test_a_small_model_leaves_the_next_one_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def fail(config: TrainConfig, reporter: Any) -> None:
        threads.append(torch.get_num_threads())
        torch.set_num_threads(1)
        raise RuntimeError("enough")

    monkeypatch.setattr(grid, "train", fail)
    torch.set_num_threads(2)
    run_grid("toy", planned(0, 1), tmp_path)
    assert threads == [2, 2]
    assert torch.get_num_threads() == 2


def test_no_handler_of_errors_takes_a_signal_for_one() -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("taken for an error")

    with pytest.raises(Stopped, match="enough"), stoppable("enough"):
        work()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunError, match="another process"), locked(tmp_path):
        pass
