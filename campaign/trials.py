"""Numbered, reproducible trials, each in a process that may die."""

import contextlib
import json
import os
import random
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

GIB = 2**30
TICK, LONGEST_TICK = 0.2, 2.0  # seconds

RIGHT, TOLD = "right answer", "clear error"  # verdicts that are no failures; others may join


class Verdict(NamedTuple):
    """Outcome of one trial."""

    kind: str  # of fault or input
    said: str  # what came of it
    failure: str | None = None  # what should not have been, if anything


class Part(NamedTuple):
    """One part of the campaign."""

    name: str
    promise: str  # what holds in each of its trials
    prepare: Callable[[Path], Any]  # once in a folder of its own; what it returns goes to trials
    trial: Callable[[Any, int], Verdict]  # the trial of that number
    count: int  # of the whole campaign
    short: int  # of the short one
    seconds: float = 600.0  # after which a trial is taken to hang
    memory: int = 4 * GIB  # that a trial may use, in bytes of address space above the beginning
    resident: int = 2 * GIB  # that it may fill
    alone: bool = False  # a trial has its own processes, and needs none around it


def generator(part: str, number: int) -> random.Random:
    """Create the random generator of one trial."""
    return random.Random(f"{part} {number}")


def run_trials(part: Part, state: Any, numbers: Sequence[int]) -> Iterator[tuple[int, Verdict]]:
    """Run some trials and yield their verdicts in order."""
    left = list(numbers)
    while left:
        if part.alone:
            yield left[0], _judged(part, state, left[0])
            left.pop(0)
            continue
        for number, verdict in _in_a_child(part, state, list(left)):
            yield number, verdict
            left.pop(0)


def _in_a_child(part: Part, state: Any, numbers: list[int]) -> Iterator[tuple[int, Verdict]]:
    """Run trials in a child process until one kills it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(part, state, numbers, writing)
    os.close(writing)
    done, unread = 0, b""
    failure = "hangs"
    try:
        while done < len(numbers):
            waiting = Waiting(child)
            while b"\n" not in unread and waiting.seconds() < part.seconds:
                if not select.select([reading], [], [], TICK)[0]:
                    continue
                block = os.read(reading, 2**16)
                if not block:
                    failure = ""
                    break
                unread += block
            if b"\n" not in unread:
                break
            line, unread = unread.split(b"\n", 1)
            yield numbers[done], Verdict(*json.loads(line))
            done += 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(reading)
    if done < len(numbers):
        failure = failure or f"the process ended with {os.waitstatus_to_exitcode(status)}"
        yield numbers[done], Verdict("", "died", failure)


def _work(part: Part, state: Any, numbers: list[int], writing: int) -> NoReturn:
    begun = _virtual_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (begun + part.memory, begun + part.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence()
    files = _open_files()
    resident = _most_resident()
    code = 0
    try:
        for number in numbers:
            verdict = _judged(part, state, number)
            used = _most_resident()
            if verdict.failure is None and used - resident > part.resident:
                grown = (used - resident) / GIB
                verdict = verdict._replace(failure=f"filled {grown:.1f} GiB of memory")
            resident = max(resident, used - part.resident)
            if verdict.failure is None and _open_files() > files + 8:
                verdict = verdict._replace(failure="leaves files open")
                files = _open_files()
            os.write(writing, json.dumps(verdict).encode() + b"\n")
    except BaseException:
        code = 1
    os._exit(code)


def _judged(part: Part, state: Any, number: int) -> Verdict:
    try:
        return part.trial(state, number)
    except Exception:
        lines = traceback.format_exc().splitlines()
        return Verdict("", "traceback", " | ".join(line.strip() for line in lines[-5:])[:600])


class Waiting:
    """Time budget of a waited-for process, counted while it runs or sleeps.

    Neither the time in which a busy machine had no CPU for it counts, nor that in which this
    process was stopped itself.

    Args:
        process: The id of the process.
    """

    def __init__(self, process: int) -> None:
        self._process, self._seconds = process, 0.0
        self._last, self._delayed = time.monotonic(), _delayed(process)

    def seconds(self) -> float:
        """Count seconds so far; to be called about every ``TICK``."""
        now, delayed = time.monotonic(), _delayed(self._process)
        passed = min(now - self._last, LONGEST_TICK)
        self._seconds += max(0.0, passed - (delayed - self._delayed))
        self._last, self._delayed = now, delayed
        return self._seconds


def _delayed(process: int) -> float:
    """Count seconds ready without a CPU; 0 where the system does not count them."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def silence() -> None:
    """Silence the output of libraries."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
