"""Launch environment: torchrun, SLURM, smallfry's launcher, or none.

All of it is read from the environment, in this one place, without PyTorch.
"""

import os
import sys
from typing import Literal, NamedTuple

from smallfry.errors import UsageError

LAUNCHER = "SMALLFRY_LAUNCHER"  # the process that started this one for --processes


class Launch(NamedTuple):
    """Launcher of this process, with its rank and world size."""

    by: Literal["torchrun", "slurm", ""]
    rank: int = 0  # of all
    processes: int = 1  # in all
    local_rank: int = 0  # of those on this machine
    here: int = 1  # processes on this machine

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.processes // self.here


def launch() -> Launch:
    """Read the launch environment.

    Raises:
        UsageError: Its variables are incomplete or contradict each other.
    """
    if _given("RANK") and _given("WORLD_SIZE"):
        return _checked(_by_torchrun())
    if _given("SLURM_STEP_NUM_TASKS") and _given("SLURM_PROCID"):
        # of srun, and not of a batch script that starts one
        tasks = _number("SLURM_STEP_NUM_TASKS")
        # in "srun --pty bash" the first task is a person's shell, and the others are no help
        if tasks > 1 and not _at_a_terminal():
            return _checked(_by_slurm(tasks))
    return Launch("")


def rank() -> int:
    """Return this process's rank; 0 in an invalid environment."""
    try:
        return launch().rank
    except UsageError:
        return 0


def is_launched() -> bool:
    """Return whether ``smallfry train --processes`` started this process."""
    return _given(LAUNCHER) != ""


def launcher_has_ended() -> bool:
    """Return whether the supervising process of ``--processes`` has ended."""
    return is_launched() and os.getppid() != _number(LAUNCHER)


def _by_torchrun() -> Launch:
    count = _number("WORLD_SIZE")
    if count > 1 and not _given("LOCAL_RANK"):
        raise UsageError(
            f"WORLD_SIZE={count} and RANK are set, but LOCAL_RANK is not: set LOCAL_RANK (and "
            "LOCAL_WORLD_SIZE) in each process, or unset RANK and WORLD_SIZE to train in this one"
        )
    here = _number("LOCAL_WORLD_SIZE", count)
    return Launch("torchrun", _number("RANK"), count, _number("LOCAL_RANK", 0), here)


def _by_slurm(tasks: int) -> Launch:
    nodes = _number("SLURM_STEP_NUM_NODES", 1)
    per_node = _given("SLURM_STEP_TASKS_PER_NODE")  # "4", "2(x3)", or "2,1" where they differ
    if "," in per_node or tasks % nodes:
        raise UsageError(
            f"SLURM has put {tasks} tasks on {nodes} nodes unevenly ({per_node or 'tasks'}): ask "
            "for as many on each, with --nodes and --ntasks-per-node"
        )
    local = _number("SLURM_LOCALID", 0)
    return Launch("slurm", _number("SLURM_PROCID"), tasks, local, tasks // nodes)


def _checked(found: Launch) -> Launch:
    _, rank, count, local, here = found
    if not (0 <= rank < count and 0 <= local < here):
        raise UsageError(
            f"the environment has process {rank} of {count}, and {local} of {here} on this "
            "machine, a contradiction: check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    if count % here:
        raise UsageError(
            f"{count} processes can't be {here} on each machine: start as many on each, such as "
            "with the same --nproc-per-node everywhere"
        )
    return found


def _at_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _given(name: str) -> str:
    return os.environ.get(name, "").strip()  # empty is as good as not set


def _number(name: str, default: int | None = None) -> int:
    text = _given(name)
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise UsageError(f"{name} in the environment must be a whole number, not '{text}'")
    return int(text)
