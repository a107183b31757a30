"""Processes that are started, watched and stopped together; tiny ones stand in for training."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from smallfry.errors import TrainingError
from smallfry.training import launch

# says that it is ready, takes its time to save, and ends as a stopped run does
SAVES = """
import os, pathlib, signal, sys, time
def save(number, frame):
    signal.signal(number, signal.SIG_DFL)
    time.sleep(float(sys.argv[2])); sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
(pathlib.Path(sys.argv[1]) / os.environ["RANK"]).touch()
time.sleep(30); sys.exit(9)
"""
ENDS = SAVES.replace("sys.exit(128 + number)", "sys.exit(0)")
# the second one ends in some way, the first waits for it
FAILS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "killed" else sys.exit(int(sys.argv[1]))
time.sleep(30)
"""


@pytest.fixture
def run(monkeypatch):
    """Two processes of a script; what it gives and how long it took."""
    monkeypatch.setattr(launch, "LAST_WORDS", 0.3)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def start(script, *arguments):
        monkeypatch.setattr(launch, "command", lambda given: [sys.executable, "-c", script, *given])
        began = time.monotonic()
        return launch.run_in_processes([str(each) for each in arguments], 2), (
            time.monotonic() - began
        )

    return start


def stop_when_ready(folder, times):
    def stop():
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    threading.Thread(target=stop).start()


def test_what_is_stopped_may_take_its_time_to_save(run, tmp_path):
    stop_when_ready(tmp_path, 1)
    code, took = run(SAVES, tmp_path, 1.5)
    assert code == 128 + signal.SIGTERM
    assert took > 1.5, "it was killed while it saved"


def test_a_second_signal_acts_at_once(run, tmp_path, capfd):
    stop_when_ready(tmp_path, 2)
    code, took = run(SAVES, tmp_path, 20)
    assert code == 128 + signal.SIGTERM
    assert took < 10
    assert capfd.readouterr().err == ""


def test_a_stop_that_comes_as_a_run_ends_is_none(run, tmp_path):
    stop_when_ready(tmp_path, 1)
    assert run(ENDS, tmp_path, 0)[0] == 0


def test_when_one_fails_the_other_is_ended(run):
    code, took = run(FAILS, 3)
    assert (code, took < 10) == (3, True)


def test_one_that_was_killed_is_said_to_be(run):
    with pytest.raises(TrainingError, match=r"process 1 of 2 was killed by signal 9.*if the run"):
        run(FAILS, "killed")


def test_nothing_is_imported_from_the_folder_it_is_started_in(tmp_path):
    for name in ("jsonargparse", "yaml", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from here')")
    said = subprocess.run(launch.command(["--help"]), cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def test_all_talk_stays_on_the_loopback():
    given = launch._environment(0, 2, 4711)
    assert given["MASTER_ADDR"] == "127.0.0.1"
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        assert given["GLOO_SOCKET_IFNAME"] == "lo"
