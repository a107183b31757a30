"""Process group of a training run, with collective decisions.

``torchrun`` or SLURM's ``srun`` starts the same command several times and numbers the processes in
their environment; nothing else needs to be set. Only the first process writes files and prints.
Whatever changes the course of a run, such as a signal, the end of patience or a checkpoint that is
due, is decided together, so that all processes take the same steps. Small messages go over a group
of their own on the CPU and never wait for a GPU.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist

from smallfry.errors import SmallfryError, Stopped, TrainingError, UsageError
from smallfry.io.signals import Signalled
from smallfry.training.cluster import Cluster, join, let_go, tell_why, why
from smallfry.training.device import find_device
from smallfry.training.launch_env import launch

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # a process may test a model while the others wait


class Processes:
    """Processes of a run, one or several.

    Args:
        fabric: Lightning's Fabric, which has launched already.
        joined: Whether the group of all was made for this run, and ends with it.
    """

    def __init__(self, fabric: Fabric, joined: bool = False) -> None:
        self.fabric = fabric
        self.rank, self.count = fabric.global_rank, fabric.world_size
        self.last: Path | None = None  # the checkpoint to go on with, if it exists
        self._joined = joined
        self._agreed = False  # that there is an error, which all raise
        self._control: Any = None
        if self.count > 1:
            self._control = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        """True for the process that writes files and messages."""
        return self.rank == 0

    def once(self, act: Callable[[], T]) -> T:
        """Run a function in the first process; all get its result or its error."""
        if self.count == 1:
            return act()
        outcome: list[Any] = [None, None]
        error: BaseException | None = None
        if self.is_first:
            try:
                outcome[0] = act()
            except BaseException as caught:  # whatever it is, the others wait for word of it
                error = caught
                outcome[1] = caught if isinstance(caught, SmallfryError) else _told(0, caught)
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            self._agreed = True
            raise error or outcome[1]
        return cast(T, outcome[0])

    def together(self, act: Callable[[], T]) -> T:
        """Run a non-communicating function in every process; if one fails, all do."""
        if self.count == 1:
            return act()
        result, error = None, None
        try:
            result = act()
        except BaseException as caught:
            error = caught
        said: list[Any] = [None] * self.count
        mine = None if error is None else _told(self.rank, error)
        dist.all_gather_object(said, mine, group=self._control)
        failed = next((each for each in said if each is not None), None)
        if failed is not None:
            self._agreed = True
            raise error or failed
        return cast(T, result)

    @contextmanager
    def held(self, lock: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter a context in the first process on behalf of all."""
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(lock)

            self.once(enter)
            yield

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the maximum of each number over all processes."""
        if self.count == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        return [int(value) for value in found]

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes, on the device, asynchronously."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def collect(self, mine: T) -> list[T]:
        """Gather values in the first process; an empty list in the others."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count if self.is_first else []
        dist.gather_object(mine, found if self.is_first else None, 0, group=self._control)
        return found

    def share_of(self, count: int) -> slice:
        """Return this process's share of ``count`` items, disjoint and as even as possible."""
        return share_of(count, self.rank, self.count)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast tensors from the first process."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def leave(self, error: BaseException | None = None) -> None:
        """Close the connections; a failure of this process alone is sent to the others."""
        if self.count == 1 or not dist.is_initialized():
            return
        if error is not None and not (self._agreed or isinstance(error, Stopped)):
            tell_why(self.rank, error)
            let_go(error)
            # NCCL would wait for what is under way
            self._joined = self._joined and self.fabric.device.type == "cpu"
        control, self._control = self._control, None
        dist.destroy_process_group(None if self._joined else control)
        del control
        gc.collect()


def _told(rank: int, error: BaseException) -> TrainingError | Stopped:
    """Serialise an error of one process for the others."""
    if isinstance(error, Signalled):
        return Stopped(error.signal_number, str(error))
    who = "the first process" if rank == 0 else f"process {rank}"
    return TrainingError(f"{who} failed: {type(error).__name__}: {error}")


def share_of(count: int, rank: int, processes: int) -> slice:
    """Divide ``range(count)`` among processes; parts differ by one at most."""
    size, more = divmod(count, processes)
    start = rank * size + min(rank, more)
    return slice(start, start + size + (rank < more))


def start(device: str, precision: Any, strategy: str) -> Processes:
    """Join the other processes, if any.

    Args:
        device: Its name, as ``find_device`` takes it.
        precision: Fabric's precision.
        strategy: "auto" or "ddp" for a copy of the model in each of several processes, "fsdp" for
            a share.

    Raises:
        UsageError: Fabric can't have that device, precision or strategy, or the environment is not
            clear on the processes.
        TrainingError: The others did not come.
    """
    started = launch()
    accelerator, devices = find_device(device, started.processes)
    settings: dict[str, Any] = {"accelerator": accelerator, "devices": devices}
    settings["precision"] = precision
    settings["plugins"] = [LightningEnvironment()]  # or it looks for SLURM by itself
    joined = False
    if started.processes > 1:
        settings |= {"devices": started.here, "num_nodes": started.nodes}
        settings["plugins"] = [Cluster(started)]
        settings["strategy"] = _shares(started.processes) if strategy == "fsdp" else _copies()
    try:
        fabric = Fabric(**settings)
        used = str(fabric.strategy.precision.precision)
        if used.startswith("bf16") and not str(precision).startswith("bf16"):
            raise UsageError(f"precision {precision} needs a GPU: take {used} on this device")
        if started.processes > 1:
            joined = join(started, fabric.strategy.root_device)
        fabric.launch()
    except (ValueError, RuntimeError, ImportError) as error:
        where = f"device {device}, precision {precision}, {started.processes} processes"
        raise UsageError(f"{where}: {error}") from error
    return Processes(fabric, joined)


def _copies() -> DDPStrategy:
    # a recursive model's initial state has no gradient in later steps on a batch
    return DDPStrategy(find_unused_parameters=True)


def _shares(count: int) -> ModelParallelStrategy:
    from smallfry.training.sharding import shard

    return ModelParallelStrategy(shard, data_parallel_size=count, tensor_parallel_size=1)


@contextmanager
def leaving(processes: Processes) -> Iterator[None]:
    """Run training, and leave the group on exit; raises as ``losing_none``."""
    try:
        with losing_none(processes):
            yield
    except BaseException as error:
        processes.leave(error)
        raise
    processes.leave()


@contextmanager
def losing_none(processes: Processes) -> Iterator[None]:
    """Translate connection errors.

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
        reason = why() or "another process of this run has ended"
        kept = "nothing was saved yet"
        if processes.last is not None and processes.last.exists():
            kept = "the last checkpoint is kept: go on with --resume, in any number of processes"
        raise TrainingError(f"{reason}, so this one can't go on; {kept}") from error


def synchronized(model: nn.Module, processes: Processes) -> nn.Module:
    """Convert batch norms to synchronised ones.

    Raises:
        UsageError: PyTorch has them on GPUs only.
    """
    if processes.fabric.device.type == "cpu":
        raise UsageError("sync_batch_norm works on GPUs only: leave it out on a CPU")
    made: nn.Module = convert_sync_batchnorm(model)  # timm's own batch norms too
    return made
