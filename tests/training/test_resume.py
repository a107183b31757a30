"""A run can be stopped anywhere, in any way, and goes on as if it had not been."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from run_helpers import TINY, StopAt, assert_same_run, metrics
from safetensors.torch import load_file

from smallfry.errors import Stopped
from smallfry.training.batches import TrainBatches
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import EMAConfig, ModelConfig, ObjectiveConfig
from smallfry.training.default_settings import with_defaults
from smallfry.training.progress import QuietReporter
from smallfry.training.train import resume, train

CHANCE = {**TINY, "random_depth": True, "drop_path": 0.3}


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(variant, tmp_path, whole):
    train(variant(run=tmp_path / "again"))
    train(variant(run=tmp_path / "other", seed=1))
    assert_same_run(whole, tmp_path / "again")
    assert metrics(whole) != metrics(tmp_path / "other")


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize(("step", "number"), list(zip([1, 6, 8, 12], SIGNALS, strict=True)))
def test_a_run_stopped_by_a_signal_and_resumed_equals_an_undisturbed_one(
    variant, tmp_path, whole, step, number
):
    with pytest.raises(Stopped, match=rf"after step {step} of 12 .*--resume") as stop:
        train(variant(run=tmp_path / "parted"), StopAt(step, number))
    assert stop.value.signal_number == number
    spent = load_checkpoint(tmp_path / "parted" / "last").trainer["progress"]["cpu_seconds"]
    assert resume(tmp_path / "parted")["measured"]["cpu_seconds"] >= round(spent, 2) > 0
    assert_same_run(whole, tmp_path / "parted")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [0, 3])
def test_a_signal_ends_a_wait_for_a_batch_that_never_comes(variant, tmp_path, whole, step, workers):
    parent, make = os.getpid(), TrainBatches.__getitem__

    class Counting(QuietReporter):
        done = 0

        def step(self, loss, images_per_second):
            self.done += 1
            (tmp_path / f"step-{self.done}").touch()

    def stuck(self, number):
        if number < step:
            return make(self, number)
        while step and not (tmp_path / f"step-{step}").exists():
            time.sleep(0.01)  # a worker is ahead
        with contextlib.suppress(FileExistsError):  # one of the workers: a late second insists
            (tmp_path / "sent").touch(exist_ok=False)
            os.kill(parent, signal.SIGTERM)
        while True:
            signal.pause()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainBatches, "__getitem__", stuck)
        with pytest.raises(Stopped, match=f"after step {step} of 12.*--resume") as stop:
            train(variant(run=tmp_path / "parted", workers=workers), Counting())
    assert ("and saved" in str(stop.value)) == (tmp_path / "parted/last").exists() == (step > 0)
    resume(tmp_path / "parted")
    assert_same_run(whole, tmp_path / "parted")


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_does_no_harm(variant, tmp_path, whole):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(variant(run=tmp_path / "parted", workers=2).to_dict()))
    code = (
        "import sys\n"
        "from smallfry.training import loop\n"
        "settle = loop.Trainer._settle\n"
        "def led(self):\n"
        "    print('step', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    settle(self)\n"
        "loop.Trainer._settle = led\n"
        "from smallfry.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "--config", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for step in range(3):
        assert process.stdout.readline() == "step\n"
        if step < 2:
            process.stdin.write("on\n")
            process.stdin.flush()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()  # which also ends the wait for a line
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    resume(tmp_path / "parted")
    assert_same_run(whole, tmp_path / "parted")


def test_a_run_can_be_stopped_many_times(variant, tmp_path, whole):
    with pytest.raises(Stopped):
        train(variant(run=tmp_path / "parted"), StopAt(2))
    for _ in range(4):
        with pytest.raises(Stopped):
            resume(tmp_path / "parted", StopAt(2))
    resume(tmp_path / "parted")
    assert_same_run(whole, tmp_path / "parted")


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(variant, tmp_path, whole):
    killed = tmp_path / "killed"
    file = tmp_path / "config.yaml"
    slow = {**variant(run=killed, checkpoint_seconds=0.0).to_dict(), "workers": 0}
    file.write_text(yaml.safe_dump(slow))
    code = (
        "import signal, sys\n"
        "from smallfry.training import loop\n"
        "settle, steps = loop.Trainer._settle, iter(range(6))\n"
        "def few(self):\n"
        "    while next(steps, None) is None:\n"
        "        signal.pause()\n"
        "    settle(self)\n"
        "loop.Trainer._settle = few\n"
        "from smallfry.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "train", "--config", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        manifest = killed / "last" / "manifest.json"
        if manifest.exists() and json.loads(manifest.read_text())["training"]["step"] >= 3:
            break
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()
    assert not (killed / "summary.json").exists()
    resume(killed)
    assert_same_run(whole, killed)


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(variant, tmp_path, whole):
    (tmp_path / "new").mkdir()
    configuration = with_defaults(variant(run=tmp_path / "new"), 1295, 8).to_dict()
    (tmp_path / "new" / "config.yaml").write_text(yaml.safe_dump(configuration))
    resume(tmp_path / "new")
    assert_same_run(whole, tmp_path / "new")


def test_resuming_a_run_that_has_ended_gives_its_summary(whole):
    assert resume(whole) == json.loads((whole / "summary.json").read_text())


def test_micro_batches_change_memory_not_the_step(variant, tmp_path):
    same = {
        "model": ModelConfig(options=TINY, drop_rate=0.0),
        "precision": "64-true",
        "epochs": 1,
    }
    for parts in (1, 3):
        train(variant(run=tmp_path / str(parts), accumulate=parts, **same))
    one, three = (load_file(tmp_path / n / "best" / "model.safetensors") for n in ("1", "3"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, three[name], atol=1e-8, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures_drawn")
def test_half_precision_resumes_exactly_too(variant, tmp_path):
    half = {"precision": "bf16-true"}
    train(variant(run=tmp_path / "whole", **half))
    with pytest.raises(Stopped):
        train(variant(run=tmp_path / "parted", **half), StopAt(7))
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")


RUNNING_BIAS = {  # the running minimum is in the checkpoint
    "objective": ObjectiveConfig("bias", normalization="running"),
    "model": ModelConfig("resnet8_mlperf_tiny"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate": 3},
        {"ema": EMAConfig(0.0)},
        {"patience": 1},
        {"objective": ObjectiveConfig("cross_entropy")},
        {"model": ModelConfig("resnet8_mlperf_tiny")},
        {"model": ModelConfig("vitrm_plus_micro_8", options=CHANCE)},
        RUNNING_BIAS,
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_kind_of_run_resumes_exactly(variant, tmp_path, settings, request):
    if settings.get("model", ModelConfig()).options == CHANCE:
        request.getfixturevalue("pictures_drawn")  # of a trace over random depths too
    settings = {"objective": ObjectiveConfig(), **settings}
    train(variant(run=tmp_path / "whole", **settings))
    with pytest.raises(Stopped):
        train(variant(run=tmp_path / "parted", **settings), StopAt(5))
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
