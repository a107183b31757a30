"""Starts two processes that train together on the CPU, and ends them whatever happens."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_pair(script: str, *arguments: object, timeout: float = 150.0) -> list[str]:
    """Run a script of the tests in two processes, as torchrun would; what they printed.

    Raises:
        AssertionError: One failed, or they were not done in time; with what they printed.
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
    pair = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = ["", ""]
    try:
        for rank, process in enumerate(pair):
            said[rank], _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for rank, process in enumerate(pair):
            if process.poll() is None:
                process.kill()
                said[rank] += process.communicate()[0] + "(not done in time)"
    codes = [process.returncode for process in pair]
    assert codes == [0, 0], f"{codes}\n{said[0]}\n{said[1]}"
    return said
