"""Device of a run by its name in the configuration."""

import re

import torch

from smallfry.errors import UsageError

NAMES = "auto, cpu, cuda, mps, or one of several GPUs such as cuda:1"


def find_device(name: str, processes: int = 1) -> tuple[str, int | list[int]]:
    """Return Fabric's accelerator and devices, of one process on this machine.

    Args:
        name: A kind of device, or one GPU as PyTorch names it.
        processes: Number of processes, each of which takes a GPU of its own.

    Raises:
        UsageError: There is no such GPU, or one for several processes.
    """
    kind, colon, index = name.partition(":")
    if not colon:
        return name, 1
    if kind in ("cpu", "mps") and index == "0":
        return kind, 1
    if kind != "cuda" or not re.fullmatch(r"[0-9]{1,4}", index):
        raise UsageError(f"device {name}: expected {NAMES}")
    if processes > 1:
        raise UsageError(f"device {name}: {processes} processes take a GPU each; give device cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index) >= count:
        there = "no GPU" if not count else ", ".join(f"cuda:{i}" for i in range(count))
        raise UsageError(f"device {name}: this machine has {there}; expected {NAMES}")
    return kind, [int(index)]
