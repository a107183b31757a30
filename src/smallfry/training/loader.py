"""Batches prefetched by worker processes, without loss if a worker dies.

A worker sends batches through shared memory, of which a container has 64 MiB by default. No more
workers are started than fit into it, and where one ends or finds it full, the training process
prepares the rest itself: a batch is a function of its step, so nothing else changes.
"""

import math
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from smallfry.data.stream import ShardPixels
from smallfry.errors import DataError, SmallfryWarning
from smallfry.io.signals import leave_to_parent
from smallfry.tasks import Batch
from smallfry.training.batches import TrainBatches
from smallfry.training.launch_env import launch

SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2  # batches that a worker prepares ahead
IN_USE = 2  # batches that the training process holds
ENDING = 1.0  # seconds
QUEUE_BYTES = 2**16  # of a worker's queue in shared memory, at most
COULD_NOT_SEND = 75  # exit code of a worker


class _WorkerLost(Exception):
    """Death of a worker with its batches."""


class TrainLoader:
    """Batches of a range of steps, prefetched by worker processes.

    Closing an iterator ends its workers.

    Args:
        batches: All batches.
        steps: Step numbers of the batches.
        workers: Number of worker processes; None for as many as help.
        pin_memory: True if batches go to a GPU.
    """

    def __init__(
        self, batches: TrainBatches, steps: range, workers: int | None, pin_memory: bool
    ) -> None:
        pixels = batches.split.pixels
        if isinstance(pixels, Tensor) and pixels.device.type != "cpu":
            workers, pin_memory = 0, False
        if workers is None:
            streamed = isinstance(pixels, ShardPixels)
            heavy = streamed or len(batches.split) * math.prod(pixels.shape[1:]) > 10**7
            cores = (os.cpu_count() or 1) // launch().here
            workers = max(0, min(8, cores - 1)) if heavy and pin_memory else 0
        self.batches, self.steps, self.pin_memory = batches, steps, pin_memory
        self.workers = _with_room(workers, _bytes_of(batches))

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches in order.

        Raises:
            DataError: An image can't be read.
        """
        done = 0
        if self.workers:
            try:
                for batch in self._ahead():
                    done += 1
                    yield batch
            except _WorkerLost as lost:
                warnings.warn(
                    f"{lost}; this process prepares the batches from here on, which takes longer "
                    "and changes nothing else: take fewer --workers",
                    SmallfryWarning,
                    stacklevel=2,
                )
        yield from self._loader(self.steps[done:], 0)

    def _loader(self, steps: range, workers: int) -> DataLoader[Batch]:
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            pin_memory=self.pin_memory,
            prefetch_factor=AHEAD if workers else None,
            worker_init_fn=_begin if workers else None,
        )

    def _ahead(self) -> Generator[Batch, None, None]:
        others = multiprocessing.active_children()
        batches: Any = None
        try:
            with _no_errors_of_children():
                batches = iter(self._loader(self.steps, self.workers))
            while (batch := next(batches, None)) is not None:
                yield batch
        except DataError as error:
            raise _of_worker(error) from None
        except Exception as error:
            if batches is None:
                raise _WorkerLost(f"workers can't be started ({error})") from error
            code = _code_of_the_ended(batches._workers)  # there is no public way to them
            if not code:
                raise
            raise _WorkerLost(_reason(code)) from error
        finally:
            ours = {*multiprocessing.active_children()} - {*others}
            if batches is not None:
                ours = {*batches._workers}
                batches._shutdown_workers()
            for worker in ours:  # which heed no SIGTERM
                worker.kill()
                worker.join()


def _bytes_of(batches: TrainBatches) -> int:
    """Compute the memory of a worker's batch: float32 images and targets, int64 labels."""
    classes = batches.augment.classes
    an_image = 4 * math.prod(batches.split.pixels.shape[1:]) + 4 * classes + 8
    return len(batches.place.rows) * an_image


def _with_room(workers: int, batch_bytes: int) -> int:
    """Limit the number of workers by shared memory for their batches."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free // launch().here
    except OSError:  # a system that has it elsewhere
        return workers
    fitting = max(0, (free - IN_USE * batch_bytes) // (AHEAD * batch_bytes + QUEUE_BYTES))
    if fitting < workers:
        warnings.warn(
            f"a batch takes {batch_bytes / 2**20:,.1f} MiB and shared memory ({SHARED_MEMORY}) has "
            f"{free / 2**20:,.1f} MiB free: starting {fitting} of {workers} workers; a container "
            "gets more with --shm-size",
            SmallfryWarning,
            stacklevel=2,
        )
    return min(workers, fitting)


def _code_of_the_ended(workers: Sequence[Any]) -> int:
    """Return the exit code of a worker that died, or is dying, by accident; else 0."""
    ending = wait([worker.sentinel for worker in workers], ENDING)
    for worker in workers:
        if worker.sentinel in ending:
            worker.join()
    return next((worker.exitcode for worker in workers if worker.exitcode), 0)


def _begin(_: int) -> None:
    """Set up a new worker, which keeps preparing batches after a signal."""
    leave_to_parent()
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]


def _end_unsent(error: Exception, batch: object) -> None:
    """End a worker that failed to send a batch, which Python would drop silently."""
    os._exit(COULD_NOT_SEND)


def _reason(exit_code: int) -> str:
    if exit_code == COULD_NOT_SEND or exit_code == -signal.SIGBUS:
        return f"a worker found shared memory ({SHARED_MEMORY}) full"
    if exit_code < 0:
        return f"a worker was ended by signal {-exit_code}, perhaps for lack of memory"
    return f"a worker ended with exit code {exit_code}"


def _of_worker(error: DataError) -> DataError:
    """Re-raise a worker's error in this process."""
    kind = type(error)
    if not str(error).startswith(f"Caught {kind.__name__} in DataLoader worker"):
        return error
    last_line = str(error).strip().splitlines()[-1]  # of the worker's traceback
    return kind(last_line.removeprefix(f"{kind.__module__}.{kind.__name__}: "))


@contextmanager
def _no_errors_of_children() -> Iterator[None]:
    """Stop PyTorch from raising errors asynchronously when a worker ends.

    It does so in a handler of SIGCHLD, which may interrupt a step or a checkpoint. Who waits for a
    batch learns of it anyway.
    """
    child = getattr(signal, "SIGCHLD", None)
    if child is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(child)
    try:
        yield
    finally:
        signal.signal(child, signal.SIG_DFL if before is None else before)
