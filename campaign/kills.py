"""Killed and resumed training runs, compared with an undisturbed run.

The run is a process of its own, a fork of one that has PyTorch loaded already. It dies at a random
moment, or exactly before its n-th change of a file, so that every gap between two changes is met.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sklearn.datasets

from campaign.command import CommandOutput, command
from campaign.neighbours import harm, plant
from campaign.runs import difference, of_optimizer, rounds_alike, without_pictures, write_config
from campaign.trials import Part, Verdict, Waiting, generator, silence

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link")
OPTIMIZERS = ("adamw", "kfac")
KINDS = (
    *("SIGKILL before a change of a file",) * 4,
    *("SIGKILL at a random moment", "SIGTERM at a random moment", "SIGTERM at a random moment"),
    *("out of memory", "file too large", "disk full", "disk read-only"),
)
HANGS = 124  # in place of an exit code
LONGEST, NAP = 120.0, 0.005  # seconds, of a run and between two looks at it


class Whole(NamedTuple):
    """Undisturbed run of an optimizer."""

    run: Path
    seconds: float
    changes: int  # of files


class Prepared(NamedTuple):
    """Prepared material of the trials."""

    folder: Path
    whole: dict[str, Whole]


class Ended(NamedTuple):
    """Result of a command's process."""

    code: int  # negative: of that signal
    said: CommandOutput | None  # unless it was killed


def prepare(folder: Path) -> Prepared:
    """Make the undisturbed runs."""
    sklearn.datasets.load_digits()
    whole = {}
    for name in OPTIMIZERS:
        run = folder / f"whole-{name}"
        counted = folder / f"changes-{name}"
        if not (run / "summary.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            write_config(folder / f"{name}.yaml", run, optimizer=of_optimizer(name))
            started = time.monotonic()
            ended = start(
                ["train", "--config", str(folder / f"{name}.yaml")],
                lambda run=run, file=counted: count_changes(run, file),
            )()
            if ended.code != 0:
                raise RuntimeError(f"the undisturbed run failed: {ended}")
            seconds = time.monotonic() - started
            (folder / f"seconds-{name}").write_text(str(seconds))
        seconds = float((folder / f"seconds-{name}").read_text())
        whole[name] = Whole(run, seconds, len(counted.read_text()))
    return Prepared(folder, whole)


def trial(prepared: Prepared, number: int) -> Verdict:
    """Kill one run once or twice."""
    random = generator("kills", number)
    kind = KINDS[number % len(KINDS)]
    name = OPTIMIZERS[number // len(KINDS) % len(OPTIMIZERS)]
    whole = prepared.whole[name]
    with tempfile.TemporaryDirectory(dir=prepared.folder) as place:
        base = Path(place)
        mounted = kind.startswith("disk") and can_mount()
        if kind.startswith("disk") and not mounted:
            return Verdict(kind, "left out: mounting is not allowed here")
        base = base / "disk"
        base.mkdir()
        if mounted:
            _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(base))
        try:
            run, file = base / "run", Path(place) / "config.yaml"
            before = plant(run)
            write_config(file, run, optimizer=of_optimizer(name))
            words = ["train", "--config", str(file)]
            said = []
            for _ in range(random.choice((1, 1, 2))):
                ended = _disturb(kind, words, run, whole, random)
                said.append(_in_words(ended))
                failure = _judge(kind, ended, run)
                if failure:
                    return Verdict(kind, said[-1], failure)
                if (run / "config.yaml").exists():
                    words = ["train", "--resume", str(run)]
            ended = start(words)()
            if ended.code != 0:
                return Verdict(kind, said[-1], f"does not go on: {ended}"[:400])
            found = difference(whole.run, run)
            if found and kind == "out of memory" and rounds_alike(whole.run, run):
                # MKL multiplies without its buffers where it finds no memory for them
                said.append(f"{said[-1]}, other rounding")
                found = None
            found = found or harm(run, before)
            return Verdict(kind, said[-1], found and f"not the undisturbed run: {found}")
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(base)], check=False)


def _disturb(kind: str, words: list[str], run: Path, whole: Whole, random) -> Ended:
    moment = random.uniform(0.02, 1.1) * whole.seconds
    if kind.startswith("SIGKILL before"):
        at = random.randrange(whole.changes)
        return start(words, lambda: die_before_change(run, at))()
    if kind.startswith("SIG"):
        number = signal.SIGKILL if kind.startswith("SIGKILL") else signal.SIGTERM
        return start(words)(moment, lambda child: os.kill(child, number))
    if kind == "out of memory":
        spare = random.randrange(0, 24 * 2**20)
        return start(words, lambda: _limit(resource.RLIMIT_AS, _address_space() + spare))()
    if kind == "file too large":
        size = random.randrange(1, 120_000)
        return start(words, lambda: _limit(resource.RLIMIT_FSIZE, size))()
    disk = run.parent
    if kind == "disk full":
        used = shutil.disk_usage(disk).used // 1024  # below which it can't be made
        _mount("-o", f"remount,size={used + random.randrange(8, 700)}k", str(disk))
        ended = start(words)()
        _mount("-o", "remount,size=64m", str(disk))
        return ended
    ended = start(words)(moment, lambda child: _remount_read_only(disk))
    _mount("-o", "remount,rw", str(disk))
    return ended


def _judge(kind: str, ended: Ended, run: Path) -> str | None:
    """Describe a fault in the result of the disturbed run, if any."""
    if ended.code == HANGS:
        return "hangs"
    if kind.startswith("SIGKILL"):
        return None if ended.code in (0, -signal.SIGKILL) else f"ended with {ended}"
    if kind == "out of memory" and ended.code < 0:
        return None  # where C and C++ find no memory to say so; the run must go on from it too
    if kind.startswith("SIGTERM") and ended.code == -signal.SIGTERM:
        return None  # before or after the training, when there is nothing to save
    if ended.said is None:
        return f"ended with {ended.code}"
    if ended.said.failure:
        return ended.said.failure
    codes = (0, 143) if kind.startswith("SIGTERM") else (0, 1, 2)
    return None if ended.code in codes else f"ended with {ended}"[:400]


def _in_words(ended: Ended) -> str:
    if ended.code < 0:
        return f"killed by {signal.Signals(-ended.code).name}"
    return {0: "had ended before", 143: "saved and stopped"}.get(ended.code, "clear error")


# Processes


def start(words: list[str], begin: Callable[[], None] = lambda: None) -> Callable[..., Ended]:
    """Start the command in a fork; calling the result waits, and may disturb it meanwhile."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setpgid(0, 0)
        silence()
        without_pictures()
        code = 1
        try:
            begin()
            said = command(*words)
            code = said.code
            for limited in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS):
                resource.setrlimit(limited, (resource.RLIM_INFINITY,) * 2)
            os.write(writing, f"{said.out[-1000:]}\0{said.err[-3000:]}".encode())
        except BaseException as error:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            where = "".join(traceback.format_exception(error)[-6:])
            os.write(writing, f"\0an error inside smallfry (escaped): {where}".encode())
        finally:
            os._exit(code & 0xFF)
    os.close(writing)

    def wait(moment: float | None = None, disturb: Callable[[int], None] | None = None) -> Ended:
        if moment is not None and disturb is not None:
            time.sleep(moment)
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                disturb(child)
        waiting, hangs = Waiting(child), False
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if waiting.seconds() > LONGEST and not hangs:
                hangs = True
                os.kill(child, signal.SIGKILL)
            time.sleep(NAP)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = b""
        while block := os.read(reading, 2**16):
            told += block
        os.close(reading)
        out, separator, err = told.decode(errors="replace").partition("\0")
        return Ended(HANGS if hangs else code, CommandOutput(code, out, err) if separator else None)

    return wait


def count_changes(run: Path, file: Path) -> None:
    """Write a byte into a file before each change below a folder, or beside it by its name."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    _before_changes(run, lambda number: os.write(descriptor, b"."))


def die_before_change(run: Path, at: int) -> None:
    """Die before the change of that number below a folder."""

    def die(number: int) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    _before_changes(run, die)


def _before_changes(run: Path, do: Callable[[int], object]) -> None:
    """Call ``do`` before each change of a file below the run's folder, and at each fsync."""
    place, count = str(run), 0

    def note() -> None:
        nonlocal count
        do(count)
        count += 1

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if str(path).startswith(place) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                note()
        elif event in CHANGES and (str(arguments[0]).startswith(place) or _relative(arguments)):
            note()

    sys.addaudithook(hook)
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        note()  # what was written is not yet sure to be there
        fsync(descriptor)

    os.fsync = noted


def _relative(arguments: tuple) -> bool:
    """Return whether shutil changes a path by its name in an open folder, as in removing trees."""
    return isinstance(arguments[0], str) and not arguments[0].startswith("/")


def _limit(what: int, size: int) -> None:
    resource.setrlimit(what, (size, resource.RLIM_INFINITY))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# Disks


@cache
def can_mount() -> bool:
    """Return whether a private disk can be mounted."""
    with tempfile.TemporaryDirectory() as place:
        try:
            _mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", place)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", place], check=False)
    return True


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def _remount_read_only(disk: Path) -> None:
    """Remount read-only even with files open for writing, which an ordinary remount refuses."""
    for _ in range(200):
        try:
            _mount("-o", "remount,ro", str(disk))
            return
        except subprocess.CalledProcessError:  # busy: a file is being written
            time.sleep(0.01)


PART = Part(
    "kills",
    "no data loss: the resumed run equals the undisturbed one bit for bit, except for the "
    "rounding of steps that were computed while memory was short",
    prepare,
    trial,
    count=400,
    short=11,
    seconds=300,
    alone=True,
)
