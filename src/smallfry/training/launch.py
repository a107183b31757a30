"""Launcher of several local processes, with supervision and signal forwarding.

torchrun's machinery could do it too, but it has one limit of time for a stop and for an accident:
what is stopped may need minutes to save, and what has lost a process must not be waited for. It
also listens on all of the machine's addresses; here all talk stays on the loopback.
"""

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TypeAlias

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from smallfry.errors import Stopped, TrainingError, UsageError
from smallfry.io.signals import Requests, handling, name_of
from smallfry.training.launch_env import LAUNCHER, launch

LAST_WORDS = 30.0  # seconds for the others to end by themselves after one has failed
AT_ONCE = 3.0  # seconds to end in after a second signal
MORE_ECHO = 0.5  # seconds, so that what insists here insists in all processes
LOOPBACK = "127.0.0.1"

Worker: TypeAlias = "subprocess.Popen[bytes]"


def run_in_processes(arguments: Sequence[str], processes: int) -> int:
    """Run ``smallfry`` with these arguments in several processes; return the exit code.

    A first signal stops them, however long they take to save; a second Ctrl-C or SIGTERM ends them
    at once.
    When one fails, the others are ended.

    Raises:
        UsageError: Not a number of processes, or one of several was started this way.
        TrainingError: A process was killed.
        Stopped: Those of a signal were.
    """
    if processes < 1:
        raise UsageError(f"--processes must be at least 1, got {processes}")
    if launch().processes > 1:
        raise UsageError(
            "torchrun or SLURM has started several processes already: leave --processes out there"
        )
    signals: list[int] = []
    workers: list[Worker] = []
    with (
        handling(lambda number, _: signals.append(number)),
        socket.create_server((LOOPBACK, 0)) as listener,
    ):
        port = listener.getsockname()[1]
        store = TCPStore(
            *(LOOPBACK, port, None, True),
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),  # which the store closes
        )
        try:
            for rank in range(processes):
                surroundings = _environment(rank, processes, port)
                # a session of its own, or a terminal's Ctrl-C would come twice
                worker = subprocess.Popen(
                    command(arguments), env=surroundings, start_new_session=True
                )
                workers.append(worker)
            failed = _watch(workers, signals)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            del store
    if failed is None:
        return 0  # a stop that came too late is none
    rank, code = failed
    if code < 0 and signals:
        stopped = f"stopped by {name_of(signals[0])}"
        raise Stopped(signals[0], f"{stopped}; if the run had saved, go on with --resume")
    if code < 0:
        raise TrainingError(
            f"process {rank} of {processes} was killed by signal {-code}, and the others were "
            "ended; if the run had saved a checkpoint, go on with --resume"
        )
    return code


def command(arguments: Sequence[str]) -> list[str]:
    """Build the command of each process, which imports nothing from its working folder."""
    return [sys.executable, "-P", "-m", "smallfry.cli", *arguments]


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    ours = {
        LAUNCHER: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # which is here already: none of them serves it
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for library in ("GLOO", "NCCL"):
        if loopback and f"{library}_SOCKET_IFNAME" not in os.environ:
            ours[f"{library}_SOCKET_IFNAME"] = loopback[0]
    return {**os.environ, **ours}


def _watch(workers: Sequence[Worker], signals: Sequence[int]) -> tuple[int, int] | None:
    """Wait for all processes, forwarding signals; return the first failure and its code."""
    passed, failed, deadline, requests = 0, None, math.inf, Requests(MORE_ECHO)
    while running := [worker for worker in workers if worker.poll() is None]:
        now = time.monotonic()
        if passed < len(signals):
            for worker in running:
                worker.send_signal(signals[passed])
            if requests.insist(signals[passed]):
                deadline = min(deadline, now + AT_ONCE)
            passed += 1
        failed = failed or _first_failure(workers)
        if failed is not None:
            deadline = min(deadline, now + LAST_WORDS)
        if now > deadline:
            for worker in running:
                worker.kill()
        time.sleep(0.1)
    return failed or _first_failure(workers)


def _first_failure(workers: Sequence[Worker]) -> tuple[int, int] | None:
    """Return the cause of simultaneous failures, preferring a killed process."""
    codes = [(rank, worker.returncode) for rank, worker in enumerate(workers) if worker.returncode]
    return min(codes, key=lambda each: each[1] > 0, default=None)
