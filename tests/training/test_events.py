"""TensorBoard's files are extra: a run goes on without them, and prints no traceback of theirs."""

import shutil
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smallfry.errors import SmallfryWarning
from smallfry.training.events import EventWriter


def test_a_folder_that_is_gone_is_one_warning(tmp_path, capsys):
    writer = EventWriter(tmp_path / "tensorboard", 1)
    writer.add_scalar("a", 1.0, 1)
    shutil.rmtree(tmp_path / "tensorboard")

    def go_on():
        for step in range(2, 400):
            writer.add_scalar("a", 1.0, step)

    with pytest.warns(SmallfryWarning, match="tensorboard: not written") as warned:
        go_on()
    assert len(warned) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_no_thread_is_started(tmp_path, monkeypatch):
    """Without memory one may die before it begins, and ``Thread.start`` would wait forever."""

    def start(thread):
        raise AssertionError("a thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    writer = EventWriter(tmp_path, 1)
    writer.add_scalar("a", 1.0, 1)


def test_tensorboard_reads_what_was_written_and_not_what_was_purged(tmp_path):
    before = EventWriter(tmp_path, 1)
    for step in (1, 2, 3):
        before.add_scalar("loss/train", 10.0 * step, step)
    after = EventWriter(tmp_path, 2)
    after.add_scalar("loss/train", 0.5, 2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss/train"]
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(1, 10.0), (2, 0.5)]


def test_files_of_one_second_have_names_of_their_own(tmp_path):
    for _ in range(3):
        EventWriter(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 3
