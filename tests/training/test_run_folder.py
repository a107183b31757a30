"""A run folder: of one run alone, and nothing of others in it is touched."""

import os
import shutil
from datetime import datetime
from pathlib import Path
from threading import Barrier, Thread

import pytest
from run_helpers import StopAt, assert_same_run

from smallfry.cli import main
from smallfry.errors import RunError, SmallfryError, Stopped, UsageError
from smallfry.studies.folder import locked
from smallfry.training import run_folder as module
from smallfry.training.config import DataConfig, ModelConfig
from smallfry.training.progress import QuietReporter
from smallfry.training.run import new_run_folder
from smallfry.training.train import resume, train

OURS = ("metrics.csv", "pictures/mine.png", "last.previous/x", "last/x", "best/x", "summary.json")


@pytest.fixture
def frozen(monkeypatch, tmp_path):
    """One second that does not pass."""

    class Clock:
        @staticmethod
        def now():
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("frozen")
def test_runs_that_begin_in_the_same_second_get_folders_of_their_own():
    names = [new_run_folder("photos/cats", "model") for _ in range(3)]
    assert [name.name for name in names] == [
        "cats-model-20260102-030405",
        "cats-model-20260102-030405-2",
        "cats-model-20260102-030405-3",
    ]
    assert all(name.is_dir() for name in names)


@pytest.mark.usefixtures("frozen")
def test_threads_that_ask_at_once_get_folders_of_their_own():
    found, barrier = [], Barrier(8)

    def ask():
        barrier.wait()
        found.extend(new_run_folder("photos", "model") for _ in range(20))

    threads = [Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(found) == 160


@pytest.mark.usefixtures("frozen")
def test_a_run_that_can_not_begin_leaves_no_folder(variant):
    with pytest.raises(UsageError, match="unknown model"):
        train(variant(run=None, model=ModelConfig("no_such_model")))
    wrong = ModelConfig(options={"depth": 0, "no_such_option": 1})
    with pytest.raises(UsageError, match="can't be built"):
        train(variant(run=None, model=wrong))
    assert not Path("runs").exists() or not os.listdir("runs")


@pytest.mark.usefixtures("frozen")
def test_a_folder_for_runs_that_can_not_be_made_is_told():
    Path("runs").write_text("of mine")
    with pytest.raises(RunError, match="can't be used as a run folder"):
        new_run_folder("photos", "model")


@pytest.mark.parametrize("name", [*OURS, "notes.txt"])
def test_a_folder_with_files_of_others_is_refused_before_the_data_is_read(variant, name):
    run = variant().run
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("of mine")
    with pytest.raises(RunError, match=rf"holds {name.split('/')[0]}, and is no run folder"):
        train(variant(data=DataConfig("no such data")))
    assert [p for p in run.rglob("*") if p.is_file()] == [run / name]
    assert (run / name).read_text() == "of mine"


def test_a_file_in_place_of_the_folder_is_refused(variant, capsys):
    run = variant().run
    run.write_text("of mine")
    assert main(["train", "--data", "no such data", "--run", str(run)]) == 1
    assert "can't be used as a run folder" in capsys.readouterr().err
    assert run.read_text() == "of mine"


def test_what_a_new_disk_and_a_killed_beginning_leave_is_no_hindrance(config, variant):
    run = config.run
    (run / "lost+found").mkdir(parents=True)
    for name in (".lock", ".DS_Store", ".smallfry-config.yaml-0-1"):
        (run / name).write_text("")
    train(variant(epochs=1))
    assert not list(run.glob(".smallfry-*"))
    assert (run / ".DS_Store").exists()
    assert (run / "lost+found").is_dir()


def test_neighbours_of_a_run_and_of_its_files_stay(variant):
    run, mine = variant().run, []
    suffixes = (".old", ".new", ".part", ".previous", ".tmp")
    for suffix in suffixes:
        beside = run.with_name(f"{run.name}{suffix}")
        beside.mkdir()
        mine.append(beside / "x")
        mine[-1].write_text("of mine")
    train(variant(epochs=1))
    for name in ("last", "best", "metrics.csv", "config.yaml", "summary.json"):
        for suffix in suffixes:
            if (name, suffix) not in (("last", ".previous"), ("best", ".previous")):
                mine.append(run / f"{name}{suffix}")
                mine[-1].write_text("of mine")
    (run / "summary.json").unlink()
    resume(run)
    assert {file.read_text() for file in mine} == {"of mine"}


@pytest.mark.slow
def test_what_a_killed_run_left_is_gone_when_it_goes_on(config, variant):
    whole = config.run.with_name("whole")
    train(variant(run=whole))
    with pytest.raises(Stopped):
        train(config, StopAt(4))
    for place in (config.run, config.run / "pictures"):
        (place / ".smallfry-last-0-1" / "new").mkdir(parents=True)
        (place / ".smallfry-metrics.csv-0-1").write_text("half")
    resume(config.run)
    assert_same_run(whole, config.run)
    assert not list(config.run.rglob(".smallfry-*"))


class Removes(QuietReporter):
    """Removes the run folder after some steps."""

    def __init__(self, run, left):
        self.run, self.left = run, left

    def step(self, loss, images_per_second):
        self.left -= 1
        if self.left == 0:
            shutil.rmtree(self.run)


@pytest.mark.filterwarnings("ignore:.*tensorboard. not written")
@pytest.mark.parametrize(
    "left",
    [1, pytest.param(6, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow), 12],
)
@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_a_run_whose_folder_is_removed_ends_with_a_clear_error(variant, left, seconds):
    config = variant(checkpoint_seconds=seconds)
    with pytest.raises(SmallfryError) as caught:
        train(config, Removes(config.run, left))
    assert str(config.run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_study_refuses_a_folder_with_files_of_others(tmp_path):
    (tmp_path / "report.html").write_text("of mine")
    with (
        pytest.raises(RunError, match=r"not a study folder, .* report\.html"),
        locked(tmp_path),
    ):
        raise AssertionError("it began")
    assert os.listdir(tmp_path) == ["report.html"]
    for mark in ("study.json", "trials.jsonl"):
        (tmp_path / mark).write_text("")
        (tmp_path / ".smallfry-x-0-1").write_text("")
        with locked(tmp_path):
            assert not (tmp_path / ".smallfry-x-0-1").exists()
        (tmp_path / mark).unlink()
