"""Starts two processes that train together on the CPU, and ends them whatever happens."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
STALLED = 120.0  # seconds without any work, after which a process is taken to hang


def run_pair(script: str, *arguments: object) -> list[str]:
    """Run a script of the tests in two processes, as torchrun would; what they printed.

    Raises:
        AssertionError: One failed, or both waited for ever; with what they printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [str(TESTS.parent / "src"), str(TESTS), *(str(p) for p in TESTS.iterdir())]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(2)]
        pair = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=file.open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, file in enumerate(files)
        ]
        try:
            wait_while_working(pair)
        finally:
            for process in pair:
                process.kill()
                process.wait()
        said = [file.read_text() for file in files]
    codes = [process.returncode for process in pair]
    assert codes == [0, 0], f"{codes}\n{said[0]}\n{said[1]}"
    return said


def wait_while_working(processes: list["subprocess.Popen[bytes]"]) -> None:
    """Wait until all have ended, one has failed, or none has worked for long."""
    worked, since = 0, time.monotonic()
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            return
        work = sum(ticks(process.pid) for process in processes)
        if work != worked:
            worked, since = work, time.monotonic()
        elif time.monotonic() - since > STALLED:
            return
        time.sleep(0.05)


def ticks(pid: int) -> int:
    """What a process has computed so far, where the system shows it; else ever more."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0 if os.path.isdir("/proc/self") else time.monotonic_ns()
    return int(words[11]) + int(words[12])
