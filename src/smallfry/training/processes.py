"""The processes that train one model: how they find each other, and what they decide together.

``torchrun`` or SLURM's ``srun`` starts the same command several times and says in the environment
which one each is; nothing else needs to be told. The first process alone writes files and speaks.
Whatever changes the course of a run, such as a signal, the end of patience or a checkpoint that is
due, is decided together, so that all processes take the same steps. Small messages go over a group
of their own on the CPU and never wait for a GPU.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist

from smallfry.errors import SmallfryError, TrainingError, UsageError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # a process may test a model while the others wait


class Launch(NamedTuple):
    """Who started this process, and how many there are."""

    by: Literal["torchrun", "slurm", ""]
    here: int  # processes on this machine
    nodes: int


def launch() -> Launch:
    """What the environment says of how this process was started."""
    given = os.environ
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= given.keys():
        count = int(given["WORLD_SIZE"])
        here = int(given.get("LOCAL_WORLD_SIZE", count))
        return Launch("torchrun", here, max(1, count // here))
    if "SLURM_STEP_NUM_TASKS" in given:  # of srun, and not of a batch script that starts one
        nodes = int(given.get("SLURM_STEP_NUM_NODES", 1))
        return Launch("slurm", max(1, int(given["SLURM_STEP_NUM_TASKS"]) // nodes), nodes)
    return Launch("", 1, 1)


class Processes:
    """The processes of a run, one of them or many.

    Args:
        fabric: Lightning's Fabric, which has launched already.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.rank, self.count = fabric.global_rank, fabric.world_size
        self._control: Any = None
        if self.count > 1:
            self._control = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def once(self, act: Callable[[], T]) -> T:
        """Do something in the first process; all get its result, or its error."""
        if self.count == 1:
            return act()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = act()
            except SmallfryError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    @contextmanager
    def held(self, lock: AbstractContextManager[Any]) -> Iterator[None]:
        """The first process holds something for all."""
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(lock)

            self.once(enter)
            yield

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each over all processes."""
        if self.count == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        return [int(value) for value in found]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the device, without waiting for it."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def collect(self, mine: T) -> list[T]:
        """What all processes have, in the first one; an empty list in the others."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count if self.is_first else []
        dist.gather_object(mine, found if self.is_first else None, 0, group=self._control)
        return found

    def share_of(self, count: int) -> slice:
        """Which of ``count`` things are this process's: as even as can be, none lost or twice."""
        return share_of(count, self.rank, self.count)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors what they are in the first process."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def share_of(count: int, rank: int, processes: int) -> slice:
    """The part of ``range(count)`` that belongs to one process; parts differ by one at most."""
    size, more = divmod(count, processes)
    start = rank * size + min(rank, more)
    return slice(start, start + size + (rank < more))


def start(device: str, precision: Any, strategy: str) -> Processes:
    """Join the other processes, if there are any.

    Args:
        device: Fabric's accelerator.
        precision: Fabric's precision.
        strategy: "auto" or "ddp" for a copy of the model in each of several processes, "fsdp" for
            a share.

    Raises:
        UsageError: Fabric can't have that device, precision or strategy.
    """
    by, here, nodes = launch()
    settings: dict[str, Any] = {"accelerator": device, "devices": 1, "precision": precision}
    if here * nodes > 1:
        slurm = by == "slurm"
        environment = SLURMEnvironment(auto_requeue=False) if slurm else TorchElasticEnvironment()
        settings |= {"devices": here, "num_nodes": nodes, "plugins": [environment]}
        settings["strategy"] = _shares(here * nodes) if strategy == "fsdp" else _copies()
    try:
        fabric = Fabric(**settings)
        fabric.launch()
    except (ValueError, RuntimeError, ImportError) as error:
        where = f"device {device}, precision {precision}, {here * nodes} processes"
        raise UsageError(f"{where}: {error}") from error
    return Processes(fabric)


def _copies() -> DDPStrategy:
    # a recursive model's initial state has no gradient in later steps on a batch
    return DDPStrategy(find_unused_parameters=True)


def _shares(count: int) -> ModelParallelStrategy:
    from smallfry.training.sharding import shard

    return ModelParallelStrategy(shard, data_parallel_size=count, tensor_parallel_size=1)


@contextmanager
def losing_none(processes: Processes) -> Iterator[None]:
    """Say of a lost connection what it is.

    Raises:
        TrainingError: Another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(
            sign in str(error) for sign in ("gloo", "Gloo", "NCCL", "Connection closed by peer")
        )
        if processes.count == 1 or not lost:
            raise
        raise TrainingError(
            "another process of this run has ended, so this one can't go on; the last checkpoint "
            "is kept: go on with --resume, in any number of processes"
        ) from error


def synchronized(model: nn.Module, processes: Processes) -> nn.Module:
    """The model with batch norms that see the whole batch.

    Raises:
        UsageError: PyTorch has them on GPUs only.
    """
    if processes.fabric.device.type == "cpu":
        raise UsageError("sync_batch_norm works on GPUs only: leave it out on a CPU")
    made: nn.Module = convert_sync_batchnorm(model)  # timm's knows its own batch norms too
    return made
