"""TensorBoard's files are extra: a run goes on without them, and prints no traceback of theirs."""

import shutil
import threading

import pytest

from smallfry.errors import SmallfryWarning
from smallfry.training.events import EventWriter


def test_a_folder_that_is_gone_is_one_warning(tmp_path, capsys):
    writer = EventWriter(tmp_path / "tensorboard", 1)
    writer.add_scalar("a", 1.0, 1)
    writer.writer.flush()
    shutil.rmtree(tmp_path / "tensorboard")

    def go_on():
        for step in range(2, 400):
            writer.add_scalar("a", 1.0, step)
        writer.close()

    with pytest.warns(SmallfryWarning, match="tensorboard: not written") as warned:
        go_on()
    assert len(warned) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_threads_of_others_are_heard_as_before(monkeypatch):
    heard = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    from smallfry.training import events

    for _ in range(3):
        events._keep_quiet()

    class _AsyncWriterThread(threading.Thread):
        pass

    def fails():
        raise OSError("no space left")

    for kind in (threading.Thread, _AsyncWriterThread):
        thread = kind(target=fails)
        thread.start()
        thread.join()
    assert len(heard) == 1
