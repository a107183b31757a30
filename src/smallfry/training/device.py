"""Device of a run by its name in the configuration."""

import re
from collections.abc import Callable

import torch

from smallfry.errors import UsageError

NAMES = "auto, cpu, cuda, mps, or one of several GPUs such as cuda:1"
KINDS: dict[str, Callable[[], bool]] = {  # whether this machine has one
    "auto": lambda: True,
    "cpu": lambda: True,
    "cuda": lambda: torch.cuda.is_available(),
    "mps": lambda: torch.backends.mps.is_available(),
}


def find_device(name: str, processes: int = 1) -> tuple[str, int | list[int]]:
    """Return Fabric's accelerator and devices, of one process on this machine.

    Args:
        name: A kind of device, or one GPU as PyTorch names it.
        processes: Number of processes, each of which takes a GPU of its own.

    Raises:
        UsageError: There is no such device, or one GPU for several processes.
    """
    kind, _, index = name.partition(":")
    if name in KINDS:
        if not KINDS[name]():
            raise UsageError(f"device {name}: this machine has none; expected {NAMES}")
        return name, 1
    if kind in ("cpu", "mps") and index == "0":
        return find_device(kind, processes)
    if kind != "cuda" or not re.fullmatch(r"[0-9]{1,4}", index):
        raise UsageError(f"device {name}: expected {NAMES}")
    if processes > 1:
        raise UsageError(f"device {name}: {processes} processes take a GPU each; give device cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index) >= count:
        there = "no GPU" if not count else ", ".join(f"cuda:{i}" for i in range(count))
        raise UsageError(f"device {name}: this machine has {there}; expected {NAMES}")
    return kind, [int(index)]
