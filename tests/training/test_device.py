"""Devices by name: kinds, single GPUs, and what there is none of."""

import pytest
import torch

from smallfry.cli import main
from smallfry.errors import UsageError
from smallfry.training.device import find_device
from smallfry.training.processes import start


@pytest.fixture
def gpus(monkeypatch):
    def set_count(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "mps"])
def test_a_kind_of_device_is_fabrics(name, gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device(name) == (name, 1)
    assert find_device(name, 4) == (name, 1)


def test_the_only_device_of_a_kind_has_a_number_too(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("mps:0") == ("mps", 1)
    assert start("cpu:0", "32-true", "auto").fabric.device == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "mps", "mps:0"])
def test_a_kind_of_device_that_a_machine_lacks_is_refused(name, gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"device {name[:4]}.*this machine has none; expected a"):
        find_device(name)


def test_one_of_several_gpus_is_taken(gpus):
    gpus(2)
    assert find_device("cuda:0") == ("cuda", [0])
    assert find_device("cuda:1") == ("cuda", [1])
    with pytest.raises(UsageError, match="cuda:2: this machine has cuda:0, cuda:1; expected auto"):
        find_device("cuda:2")
    with pytest.raises(UsageError, match="cuda:1: 2 processes take a GPU each; give device cuda"):
        find_device("cuda:1", 2)


def test_a_gpu_of_a_machine_without_one_is_refused(gpus, tmp_path, capsys):
    gpus(0)
    with pytest.raises(UsageError, match="cuda:0: this machine has no GPU; expected auto, cpu"):
        start("cuda:0", "32-true", "auto")
    run = tmp_path / "run"
    assert main(["train", "--device", "cuda:0", "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert "device cuda:0: this machine has no GPU" in error
    assert len(error.splitlines()) == 1
    assert not run.exists()


@pytest.mark.parametrize(
    "name", ["gpu", "0", "", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cuda:٣", "cpu:1", ":0"]
)
def test_other_names_are_refused(name, gpus):
    gpus(8)
    with pytest.raises(UsageError, match="expected auto, cpu, cuda, mps, or one of several GPUs"):
        find_device(name)
