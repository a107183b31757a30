"""Every verb that writes ends in good order on a signal: nothing is left, one line is said."""

import itertools
import os
import pty
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from smallfry.cli import main
from smallfry.training.checkpoint import load_checkpoint

TINY = (
    "--model.options={embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}"
)
TRAIN = ["train", TINY, "--epochs=1", "--data.limit=200", "--references=false"]
TRAIN += ["--batch_size=64", "--progress=quiet", "--run"]
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
VERBS = {
    "export": ["export", "{run}", "--to", "{place}/made"],
    "export int8": ["export", "{run}", "--to", "{place}/made", "--precision", "int8"],
    "share": ["share", "{run}", "--to", "{place}/made"],
    "benchmark": [
        *("benchmark", "{run}", "--folder", "{place}/made"),
        *("--forms", "float32", "--batch_sizes", "1", "--seconds", "0.01"),
    ],
}
LONG = ("export int8", "benchmark")

pytestmark = pytest.mark.slow


class SignalOnWriting:
    """Sends this process a signal as it opens its nth file for writing, or moves its nth one."""

    def __init__(self):
        self.left = None
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.left is None:
            return
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wx"
        if writes or event in ("tempfile.mkdtemp", "os.rename"):
            self.left -= 1
            if self.left == 0:
                self.left = None
                os.kill(os.getpid(), self.number)


HOOK = SignalOnWriting()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main([*TRAIN, str(folder)]) == 0
    return folder


def listing(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "verb",
    [pytest.param(v, marks=pytest.mark.slow) if v in LONG else v for v in VERBS],
)
def test_a_signal_at_any_write_leaves_nothing_behind(verb, run, tmp_path, monkeypatch, capsys):
    """At the first write, the third, the ninth, … until there are no more."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    numbers, was = itertools.cycle(SIGNALS), listing(run)
    place = tmp_path / "place"
    place.mkdir()
    command = [part.format(run=run, place=place) for part in VERBS[verb]]
    stops = 0
    for nth in (3**power for power in itertools.count()):
        HOOK.number = number = next(numbers)
        HOOK.left = nth
        try:
            code = main(command)
        finally:
            HOOK.left = None
        said = capsys.readouterr().err.splitlines()
        assert listing(tmp_path / "tmp") == []
        assert listing(run) == was
        if code == 0:
            break
        stops += 1
        assert code == 128 + number, said
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        assert said[-1] == f"smallfry: stopped by {name}"
        assert not any("Traceback" in line for line in said)
        assert {path.name for path in place.iterdir()} <= {"made"}
    assert stops >= 2, "no write was seen: nothing is tested"
    assert {path.name for path in place.iterdir()} == {"made"}


@pytest.mark.parametrize("number", SIGNALS)
def test_what_a_stopped_training_had_not_saved_is_told(number, tmp_path, monkeypatch, capsys):
    from smallfry.training import train as training

    def stop(*_):
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(training, "conclude", stop)  # when all steps are done
        assert main([*TRAIN, str(tmp_path / "a")]) == 128 + number
    said = capsys.readouterr().err.splitlines()[-1]
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    again = f"go on with: smallfry train --resume {tmp_path}"
    assert said == f"smallfry: stopped by {name}; what is saved ends with step 3; {again}/a"
    assert main(["train", "--resume", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(training, "provenance", stop)  # before the first step
        assert main([*TRAIN, str(tmp_path / "b")]) == 128 + number
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"smallfry: stopped by {name}; no step is saved yet; {again}/b"


def test_a_run_whose_terminal_is_closed_saves_though_it_can_not_speak(tmp_path):
    code = "import os, pty, sys; from smallfry.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *TRAIN, str(tmp_path / "run")]
    command += ["--epochs=100000", "--progress=plain"]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    said = b""
    while b"epoch " not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert load_checkpoint(tmp_path / "run" / "last").trainer["progress"]["step"] >= 2


def test_timeout_sends_its_signal_twice_and_the_run_is_saved(tmp_path):
    """As ``timeout`` does: to its child, and to the child's group."""
    code = (
        "import sys; from smallfry.cli import main; from smallfry.io import signals; "
        "signals.ECHO = 10_000.0; sys.exit(main(sys.argv[1:]))"  # however slow this machine is
    )
    command = [sys.executable, "-c", code, *TRAIN, str(tmp_path / "run")]
    command += ["--epochs=100000", "--progress=plain"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None, process.stderr.read()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "and saved; go on with" in errors
    assert Path(tmp_path / "run" / "last").exists()
