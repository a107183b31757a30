"""Processes that are started, watched and stopped together; tiny ones stand in for training."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from smallfry.errors import Stopped, TrainingError
from smallfry.io import signals
from smallfry.training import launch

# is ready, saves until it is let go on, and ends as a stopped run does
SAVES = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def save(number, frame):
    (folder / f"saving-{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, save)
(folder / f"ready-{rank}").touch()
while True:
    signal.pause()
"""
ENDS = SAVES.replace("sys.exit(128 + number)", "sys.exit(0)")
# the second one ends in some way, the first waits for it for ever
FAILS = """
import os, signal, sys
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "killed" else sys.exit(int(sys.argv[1]))
while True:
    signal.pause()
"""


@pytest.fixture
def run(monkeypatch):
    """Two processes of a script; what it gives."""
    monkeypatch.setattr(launch, "LAST_WORDS", 0.3)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def start(script, *arguments):
        monkeypatch.setattr(launch, "command", lambda given: [sys.executable, "-c", script, *given])
        return launch.run_in_processes([str(each) for each in arguments], 2)

    return start


def when_there(folder, name, act):
    """Act once both processes have left a file."""

    def watch():
        while len(list(folder.glob(f"{name}-*"))) < 2:
            time.sleep(0.01)
        act()

    threading.Thread(target=watch, daemon=True).start()


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_what_it_stops_may_take_its_time_to_save(run, tmp_path, number):
    monitored = []

    def let_go():
        for _ in range(3):  # looks of the launcher
            monitored.append(len(list(tmp_path.glob("saving-*"))))
            time.sleep(0.15)
        (tmp_path / "go").touch()

    when_there(tmp_path, "ready", lambda: send(number))
    when_there(tmp_path, "saving", let_go)
    assert run(SAVES, tmp_path) == 128 + number
    assert monitored == [2, 2, 2]


def test_a_second_signal_acts_at_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "ECHO", 0.0)
    monkeypatch.setattr(launch, "MORE_ECHO", 0.0)
    monkeypatch.setattr(launch, "AT_ONCE", 0.1)
    monkeypatch.setattr(launch, "LAST_WORDS", 10_000.0)
    when_there(tmp_path, "ready", lambda: send(signal.SIGTERM))
    when_there(tmp_path, "saving", lambda: send(signal.SIGINT))
    with pytest.raises(
        Stopped, match=r"stopped by SIGTERM; if the run had saved.*--resume"
    ) as stop:
        run(SAVES, tmp_path)
    assert stop.value.signal_number == signal.SIGTERM


def test_an_echo_does_not(run, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "ECHO", 10_000.0)
    when_there(tmp_path, "ready", lambda: send(signal.SIGTERM))
    when_there(tmp_path, "saving", lambda: (send(signal.SIGTERM), (tmp_path / "go").touch()))
    assert run(SAVES, tmp_path) == 128 + signal.SIGTERM


def test_a_stop_that_comes_as_a_run_ends_is_none(run, tmp_path):
    (tmp_path / "go").touch()
    when_there(tmp_path, "ready", lambda: send(signal.SIGTERM))
    assert run(ENDS, tmp_path) == 0


def test_when_one_fails_the_other_is_ended(run):
    assert run(FAILS, 3) == 3


def test_one_that_was_killed_is_said_to_be(run):
    with pytest.raises(TrainingError, match=r"process 1 of 2 was killed by signal 9.*if the run"):
        run(FAILS, "killed")


@pytest.mark.slow
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
