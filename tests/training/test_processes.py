"""Two processes that share each batch do what one does, and end together."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from compress_methods import Freeze, Observe, Scaled, Shrink
from run_helpers import TINY, StopAt, metrics
from safetensors.torch import load_file
from two_processes import run_pair

from smallfry.errors import Stopped
from smallfry.models.contract import tensors
from smallfry.training.augment import Augment
from smallfry.training.batches import TrainBatches
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from smallfry.training.processes import share_of
from smallfry.training.train import resume, train

pytestmark = pytest.mark.slow

# dropout draws apart in each process, so there is none where weights are to be the same; sums are
# in another order, which shows in the loss: Fabric gives the logits of "64-true" in float32
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def settings(run, **changes):
    given = {
        "data": DataConfig(limit=200),
        "model": ModelConfig(options=TINY, drop_rate=0.0),
        "augment": AugmentConfig(crop_padding=1, flip=True, mixup=0.2, cutmix=1.0),
        "objective": ObjectiveConfig(supervision_steps=3, halt_threshold=0.25),
        "epochs": 2,
        "batch_size": 32,
        "threads": 1,
        "precision": "64-true",
        "checkpoint_seconds": 1000.0,
        "references": False,
        "run": run,
        "progress": "quiet",
    }
    return TrainConfig(**{**given, **changes})


RUNS = {
    "deep_supervision": {},
    "cross_entropy": {
        "objective": ObjectiveConfig("cross_entropy", label_smoothing=0.1),
        "model": ModelConfig("vit_tiny_patch16_224", options={"depth": 1, "patch_size": 4}),
        "patience": 1,
    },
    "kfac": {
        "optimizer": OptimizerConfig("kfac", lr=0.05, options={"statistics_every": 3}),
        "ema": EMAConfig(0.9),
    },
    "methods": {
        "methods": [Observe(), Freeze(0.3), Shrink(), Scaled(), {"round_weights": {"bits": 8}}],
        "optimizer": OptimizerConfig("sgd", lr=0.05),
        "accumulate": 2,
    },
    "fsdp": {
        "strategy": "fsdp",
        "precision": "32-true",
        "objective": ObjectiveConfig("cross_entropy"),
        "model": ModelConfig("vit_tiny_patch16_224", options={"depth": 2, "patch_size": 4}),
        "optimizer": OptimizerConfig("sgd", lr=0.02),
        "accumulate": 2,
    },
    "fsdp of a recursive model": {
        "strategy": "fsdp",
        "precision": "32-true",
        "optimizer": OptimizerConfig("adamw", lr=0.01, options={"eps": 1e-2}),
    },
    # 17 and 16 images, in 6 and in 8 micro-batches
    "uneven": {"batch_size": 33, "accumulate": 8, "optimizer": OptimizerConfig("sgd", lr=0.05)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process in alone/, of two in pair/, and what the two complained of."""
    place = tmp_path_factory.mktemp("processes")
    os.environ["SMALLFRY_CACHE"] = str(place / "cache")
    torch.set_num_threads(1)
    for name, changes in RUNS.items():
        train(settings(place / "alone" / name, **changes))
    with pytest.raises(Stopped):
        train(settings(place / "alone" / "parted"), StopAt(5))
    run_pair("training/training_pair.py", place)
    return place


def assert_same(one, other, precise=True):
    tolerance = TOLERANCE if precise else {"rtol": 1e-3, "atol": 1e-5}
    near = {"rel": 1e-5, "abs": 1e-5} if precise else {"rel": 1e-3, "abs": 1e-4}
    for checkpoint in ("last", "best"):
        first, second = (load_file(run / checkpoint / "model.safetensors") for run in (one, other))
        assert first.keys() == second.keys()
        for name, weight in first.items():
            torch.testing.assert_close(weight, second[name], **tolerance, msg=name)
    for first, second in zip(metrics(one), metrics(other), strict=True):
        assert first.keys() == second.keys()
        for key in first:
            # calibration is summed in float32
            assert float(first[key]) == pytest.approx(float(second[key]), **near), key


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_half_batches_give_the_weights_of_one(folder, name):
    assert_same(folder / "alone" / name, folder / "pair" / name, not name.startswith("fsdp"))
    summary = json.loads((folder / "pair" / name / "summary.json").read_text())
    alone = json.loads((folder / "alone" / name / "summary.json").read_text())
    assert summary["measured"]["test"] == pytest.approx(
        alone["measured"]["test"], rel=1e-3, abs=1e-4
    )


def test_a_batch_is_left_early_by_all_or_by_none(folder):
    taken = [float(row["supervision_steps"]) for row in metrics(folder / "pair/deep_supervision")]
    assert any(steps % 1 for steps in taken), "the decision was always the same: nothing is tested"


def test_a_signal_to_one_process_stops_both_and_one_goes_on(folder):
    for rank in range(2):
        said = (folder / f"stopped-{rank}.txt").read_text()
        assert said.startswith("Stopped: stopped after step 5 of 12")
    resume(folder / "pair" / "stopped")
    assert_same(folder / "alone" / "deep_supervision", folder / "pair" / "stopped")


def test_one_goes_on_with_what_two_held_shares_of(folder):
    resume(folder / "pair" / "shares")
    name = "fsdp of a recursive model"
    assert_same(folder / "alone" / name, folder / "pair" / "shares", precise=False)


def test_two_go_on_with_what_one_began(folder):
    assert_same(folder / "alone" / "deep_supervision", folder / "alone" / "parted")


def test_a_loss_that_is_no_number_in_one_process_stops_both(folder):
    for rank in range(2):
        said = (folder / f"spoiled-{rank}.txt").read_text()
        assert said.startswith("TrainingError: step 4 (epoch 1): the loss is nan")
        assert "last good checkpoint is kept" in said
    kept = load_checkpoint(folder / "pair" / "spoiled" / "last")
    assert kept.trainer["progress"]["step"] == 3


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("small", "UsageError: 2 processes can't share a batch of 1 images"),
        ("taken", "RunError: "),
        ("shared_kfac", "UsageError: kfac needs whole layers"),
        ("shared_methods", "UsageError: methods need whole layers"),
        ("shared_uneven", "UsageError: strategy fsdp needs a batch_size"),
        ("batch_norm", "UsageError: sync_batch_norm works on GPUs only"),
    ],
)
def test_a_mistake_is_everyones_error_and_leaves_nothing(folder, name, part):
    for rank in range(2):
        assert (folder / f"{name}-{rank}.txt").read_text().startswith(part)


@pytest.mark.parametrize(
    ("name", "failing", "own", "told"),
    [
        ("score", 0, "OSError: the disk is full", "the first process failed: OSError: the disk"),
        ("__getitem__", 1, "DataError: photo.png: damaged", "process 1 failed: DataError: photo"),
        (
            "load_training_data",
            1,
            "DataError: photo.png: gone",
            "process 1 failed: DataError: photo",
        ),
    ],
)
def test_an_error_of_one_process_is_told_to_the_other(folder, name, failing, own, told):
    said = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(2)]
    assert said[failing].startswith(own)
    assert said[1 - failing].startswith(f"TrainingError: {told}")


@pytest.mark.parametrize(("count", "processes"), [(8, 2), (9, 4), (3, 3), (2, 3)])
def test_shares_are_even_and_cover_everything_once(count, processes):
    shares = [range(count)[share_of(count, rank, processes)] for rank in range(processes)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_parts_of_a_batch_are_the_batch(processes):
    from smallfry.data import load_data

    data = load_data("digits", limit=60)
    config = AugmentConfig(crop_padding=1, flip=True, randaugment_ops=1, mixup=0.2, cutmix=1.0)
    augment = Augment(config, 8, 10, data.mean, data.std, flip=True)
    for size in (6, 7):
        whole = TrainBatches(data.train, augment, size, 5)
        parts = [TrainBatches(data.train, augment, size, 5, i, processes) for i in range(processes)]
        for step in range(6):
            shared = [part[step] for part in parts]
            together = zip(*(tensors(part) for part in shared), strict=True)
            for found, expected in zip(together, tensors(whole[step]), strict=True):
                assert torch.equal(torch.cat(found), expected)


def children(process):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == process.pid:
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_killing_one_process_ends_the_other_and_the_run_goes_on(tmp_path):
    run = tmp_path / "killed"
    file = tmp_path / "config.yaml"
    slow = settings(run, checkpoint_seconds=0.0, epochs=1000)  # which nobody waits for
    file.write_text(yaml.safe_dump({**slow.to_dict(), "patience": None}))
    command = [sys.executable, "-m", "smallfry.cli", "train", "--processes", "2"]
    command += ["--config", str(file)]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while launcher.poll() is None and not (run / "last" / "manifest.json").exists():
            time.sleep(0.02)
        workers = children(launcher)
        assert len(workers) == 2, launcher.communicate()[1]
        os.kill(workers[1], signal.SIGKILL)
        _, said = launcher.communicate()
        assert launcher.returncode == 1
        assert "was killed by signal 9" in said
        assert "--resume" in said
        assert "Traceback" not in said
        assert all(not Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        launcher.kill()
        launcher.wait()
    kept = load_checkpoint(run / "last").trainer["progress"]["step"]
    assert 1 <= kept < 6000


def wait_for(process, words):
    """Read a process's output up to a line that begins with these words."""
    while not process.stdout.readline().startswith(words):
        assert process.poll() is None, process.communicate()[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_second_signal_ends_processes_that_wait_for_each_other_and_tells_what_is_saved(
    tmp_path,
):
    run = tmp_path / "run"
    file = tmp_path / "config.yaml"
    endless = settings(run, checkpoint_seconds=0.0, epochs=1000, progress="plain")
    file.write_text(yaml.safe_dump({**endless.to_dict(), "patience": None}))
    code = """
import os, sys, threading
from smallfry.io import signals
from smallfry.training import launch
signals.ECHO, launch.MORE_ECHO, launch.AT_ONCE = 0.0, 0.0, 10_000.0
insist = signals.Requests.insist
def heard(self, number):
    if threading.current_thread() is not threading.main_thread():  # which may hear it too, later
        os.write(1, f"heard {os.environ['RANK']}\\n".encode())  # in one piece, as others write too
    return insist(self, number)
signals.Requests.insist = heard
launch.command = lambda given: [sys.executable, "-c", sys.argv[1], *given]
from smallfry.cli import main
sys.exit(main(sys.argv[2:] if "RANK" not in os.environ else sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, code, "train", "--processes", "2"]
    command += ["--config", str(file)]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    watchdog = threading.Timer(1200, os.killpg, (launcher.pid, signal.SIGKILL))
    watchdog.start()
    try:
        wait_for(launcher, "epoch")
        _, second = children(launcher)
        os.kill(second, signal.SIGSTOP)  # the first now waits for it, inside gloo
        launcher.send_signal(signal.SIGTERM)
        wait_for(launcher, "heard 0")
        launcher.send_signal(signal.SIGTERM)
        wait_for(launcher, "heard 0")
        os.kill(second, signal.SIGCONT)
        _, said = launcher.communicate()
        assert launcher.returncode == 128 + signal.SIGTERM, said
        assert "stopped at once by a second SIGTERM; what is saved ends with step" in said
        assert f"smallfry train --resume {run}" in said
    finally:
        watchdog.cancel()
        launcher.kill()
        launcher.wait()
