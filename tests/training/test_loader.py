"""Batches that workers prepare arrive, whatever becomes of the workers."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple

import pytest
import torch
from torch.utils.data import get_worker_info

from smallfry.data import load_data
from smallfry.errors import SmallfryWarning
from smallfry.models.contract import tensors
from smallfry.training import loader
from smallfry.training.augment import Augment
from smallfry.training.batches import TrainBatches
from smallfry.training.config import AugmentConfig
from smallfry.training.loader import TrainLoader

MIB = 2**20


class Troubled(TrainBatches):
    """Batches of which the fifth comes to grief in a worker."""

    trouble = None

    def __getitem__(self, step):
        if step == 4 and get_worker_info() is not None:
            return self.trouble()
        return super().__getitem__(step)


def batches(kind=TrainBatches, batch_size=8):
    data = load_data("digits", limit=100)
    augment = Augment(AugmentConfig(), 8, 10, data.mean, data.std, flip=False)
    return kind(data.train, augment, batch_size, 0)


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(tensors(mine), tensors(theirs), strict=True):
            assert torch.equal(one, other)


TROUBLES = {
    "ended by signal 9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ended with exit code 3": lambda: os._exit(3),
    "found shared memory .* full": lambda: threading.Lock(),  # which no queue can send
}


@pytest.mark.parametrize(("said", "workers"), list(zip(TROUBLES, (1, 2, 2), strict=True)))
@pytest.mark.slow
def test_what_a_worker_has_lost_this_process_prepares(said, workers, monkeypatch, capfd):
    monkeypatch.setattr(Troubled, "trouble", staticmethod(TROUBLES[said]))
    with pytest.warns(SmallfryWarning, match=said):
        found = list(TrainLoader(batches(Troubled), range(1, 20), workers, pin_memory=False))
    assert_same(found, [batches()[step] for step in range(1, 20)])
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_ends_interrupts_no_step(monkeypatch):
    monkeypatch.setattr(Troubled, "trouble", staticmethod(TROUBLES["ended with exit code 3"]))
    before = signal.getsignal(signal.SIGCHLD)
    prepared = iter(TrainLoader(batches(Troubled), range(20), 2, pin_memory=False))
    next(prepared)
    while len(multiprocessing.active_children()) == 2:
        pass  # until the worker has ended: nothing is raised here
    with pytest.warns(SmallfryWarning, match="exit code 3"):
        assert len(list(prepared)) == 19
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_worker_that_heeds_nothing_is_not_waited_for(monkeypatch):
    def hang():
        while True:
            signal.pause()

    monkeypatch.setattr(Troubled, "trouble", staticmethod(hang))
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    prepared = iter(TrainLoader(batches(Troubled), range(20), 1, pin_memory=False))
    next(prepared)
    prepared.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("workers", "free", "started"),
    [(8, 100, 8), (8, 18.5, 8), (8, 18, 7), (8, 6.5, 2), (8, 3.9, 0), (0, 0, 0)],
)
def test_no_more_workers_are_started_than_shared_memory_holds(workers, free, started, monkeypatch):
    usage = namedtuple("usage", "free")(int(free * MIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if started == workers:
        assert loader._with_room(workers, MIB) == started
    else:
        with pytest.warns(SmallfryWarning, match=f"starting {started} of 8"):
            assert loader._with_room(workers, MIB) == started


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    usage = namedtuple("usage", "free")(13 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.warns(SmallfryWarning, match="starting 2 of 8"):
        assert loader._with_room(8, MIB) == 2


def test_without_such_a_place_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path / "none")
    assert loader._with_room(8, MIB) == 8


def test_the_size_of_a_batch_is_known_before_there_is_one():
    for size in (8, 7):
        made = batches(batch_size=size)
        assert loader._bytes_of(made) == sum(t.nbytes for t in (made[0].inputs, *made[0].targets))


SMALL_MEMORY = """
import os, sys, warnings
from test_loader import batches, assert_same
from smallfry.training import loader
from smallfry.training.loader import TrainLoader
checked = loader._with_room
for check in (lambda workers, size: workers, checked):
    loader._with_room = check
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = list(TrainLoader(batches(batch_size=64), range(12), 4, pin_memory=False))
    assert_same(found, [batches(batch_size=64)[step] for step in range(12)])
    print(*[each.message for each in said if "shared memory" in str(each.message)])
sys.stdout.flush()
os._exit(0)  # without the libraries' own cleaning up, which aborted once in some hundred runs
"""


@pytest.mark.slow
def test_a_container_with_little_shared_memory_trains():
    mount = "mount -t tmpfs -o size=160k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm is not allowed here")
    inside = ["unshare", "-m", "bash", "-c", f'{mount} && exec "$0" "$@"']
    ended = subprocess.run(
        [*inside, sys.executable, "-c", SMALL_MEMORY],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    unchecked, checked = ended.stdout.splitlines()
    assert unchecked.startswith("a worker found shared memory (/dev/shm) full; this process")
    assert re.search("a batch takes 0.0 MiB and .* MiB free: starting [01] of 4 workers", checked)
    assert "Traceback" not in ended.stderr


def test_workers_that_can_not_be_started_are_done_without(monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", full)
    with pytest.warns(SmallfryWarning, match=r"can't be started \(No space"):
        found = list(TrainLoader(batches(), range(3), 2, pin_memory=False))
    assert_same(found, [batches()[step] for step in range(3)])
