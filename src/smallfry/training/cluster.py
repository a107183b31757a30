"""Rendezvous of the processes of a run: address, port, and a timeout.

Lightning's own environment for SLURM requires ``--ntasks-per-node`` and takes the number of tasks
of the job for that of the step; this one reads the variables that ``srun`` sets for the step.
"""

import os
import traceback
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from smallfry.errors import TrainingError, UsageError, first_line
from smallfry.training.launch_env import Launch

MEETING = timedelta(minutes=5)  # until all processes are there
STEP = timedelta(minutes=30)  # as PyTorch's own, until all are through with a sum

_store: Any = None  # where the processes met, kept for as long as this one lives
_meetings = 0


class Cluster(ClusterEnvironment):
    """Lightning cluster environment of processes started by torchrun or SLURM."""

    def __init__(self, started: Launch) -> None:
        super().__init__()
        self.started = started

    @property
    def creates_processes_externally(self) -> bool:
        """True: all processes are running already."""
        return True

    @property
    def main_address(self) -> str:
        """Machine of the first process."""
        return address(self.started)

    @property
    def main_port(self) -> int:
        """Port of the first process."""
        return port(self.started)

    @staticmethod
    def detect() -> bool:
        """Never detect automatically: ``processes.start`` selects it."""
        return False

    def world_size(self) -> int:
        """Return the number of processes."""
        return self.started.processes

    def set_world_size(self, size: int) -> None:
        """Do nothing; known already."""

    def global_rank(self) -> int:
        """Return this process's global rank."""
        return self.started.rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing; known already."""

    def local_rank(self) -> int:
        """Return this process's rank on its machine."""
        return self.started.local_rank

    def node_rank(self) -> int:
        """Return the machine's rank."""
        return self.started.rank // self.started.here


def address(started: Launch) -> str:
    """Return the machine of the first process; MASTER_ADDR overrides."""
    given = os.environ.get("MASTER_ADDR")
    hosts = os.environ.get("SLURM_STEP_NODELIST")
    if given or started.nodes == 1 or not hosts:
        return given or "127.0.0.1"
    return SLURMEnvironment.resolve_root_node_address(hosts)


def port(started: Launch) -> int:
    """Return the first process's port, one per step of each job; MASTER_PORT overrides."""
    numbers = {}
    for name in ("MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        text = os.environ.get(name, "").strip() or "0"
        if not text.isdecimal():
            raise UsageError(f"{name} in the environment must be a whole number, not '{text}'")
        numbers[name] = int(text)
    if numbers["MASTER_PORT"]:
        return numbers["MASTER_PORT"]
    # below what systems give to connections; neighbouring jobs and steps stay apart
    return 15_000 + (numbers["SLURM_JOB_ID"] * 101 + numbers["SLURM_STEP_ID"]) % 16_000


def join(started: Launch, device: torch.device) -> bool:
    """Create PyTorch's group of all processes; return whether there was none.

    Raises:
        TrainingError: The others did not come.
    """
    global _meetings
    if dist.is_initialized():
        return False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _meet(started)
    _meetings += 1  # what an earlier group left in the store must not be read again
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=PrefixStore(f"smallfry {_meetings}", store),
        rank=started.rank,
        world_size=started.processes,
        timeout=STEP,
        device_id=None if device.type == "cpu" else device,
    )
    return True


def _meet(started: Launch) -> Any:
    global _store
    if _store is None:
        where, number = address(started), port(started)
        os.environ |= {"MASTER_ADDR": where, "MASTER_PORT": str(number)}
        url = f"env://?rank={started.rank}&world_size={started.processes}"
        try:
            _store, _, _ = next(rendezvous(url, timeout=MEETING))
        except dist.DistError as error:
            raise TrainingError(
                f"process {started.rank} waited up to {MEETING.seconds // 60} minutes for "
                f"{started.processes} processes to meet at {where}, port {number} "
                f"({first_line(error)[:200]}). Were all of them started? For a single "
                "process unset WORLD_SIZE, or use srun; if the port is taken, set MASTER_PORT"
            ) from error
    return _store


def tell_why(rank: int, error: BaseException) -> None:
    """Publish the reason why this process failed."""
    reason = f"process {rank} failed: {type(error).__name__}: {error}"[:2000]
    try:
        PrefixStore(f"smallfry {_meetings}", _store).set("why", reason)
    except (RuntimeError, TypeError):  # whoever kept the store is gone
        return


def why() -> str:
    """Read the failure of another process, if it published one."""
    try:
        store = PrefixStore(f"smallfry {_meetings}", _store)
        return store.get("why").decode(errors="replace") if store.check(["why"]) else ""
    except (RuntimeError, TypeError):
        return ""


def let_go(error: BaseException | None) -> None:
    """Clear the frames of an error, so that connections can be closed.

    A group of processes hangs up when nothing uses it any more, and until then the others wait.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
