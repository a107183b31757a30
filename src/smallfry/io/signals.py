"""Stop signals: Ctrl-C, SIGTERM, a closed terminal (SIGHUP), a warning (SIGUSR1).

The first one is an exception (``raising``), so that what was begun is cleaned up, or a note
(``noting``), where a step must be finished and saved. A second Ctrl-C or SIGTERM ends the process
at once (``second_ends``), whatever its main thread waits for. SIGUSR1 is what SLURM sends ahead of
the end of a job; it and SIGHUP, which a closing terminal repeats, are never taken for a second one.
"""

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from smallfry_runtime.background import BackgroundThread, silent_thread_deaths

T = TypeVar("T")
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
ASKING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
INSISTENT = (signal.SIGINT, signal.SIGTERM)
ECHO = 1.0  # seconds in which signals are one: `timeout` and `torchrun` send theirs twice
LAST_WORDS = 2.0  # seconds that a message at the end may take

_kept: list[Callable[[], str]] = []  # what is known to be saved, by what saves; the last one counts


class Signalled(KeyboardInterrupt):
    """Stop signal, not caught by error handlers."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal_number = number
        self.kept = ""  # the sentence on what is saved

    def __str__(self) -> str:
        return _joined(f"stopped by {name_of(self.signal_number)}", self.kept)


class Requests:
    """Received signals.

    Args:
        more_echo: Seconds beyond ``ECHO`` in which two are one.
        clock: Seconds.
    """

    def __init__(self, more_echo: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._echo, self._clock = ECHO + more_echo, clock
        self._first: float | None = None

    def insist(self, number: int) -> bool:
        """Record a signal; return True for a second Ctrl-C or SIGTERM that is not an echo."""
        if number not in INSISTENT:
            return False
        now = self._clock()
        if self._first is None:
            self._first = now
        return now - self._first > self._echo


def name_of(number: int) -> str:
    """Return the usual name of a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle stop signals; in threads other than the main one, do nothing.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number not in INSISTENT:
            _let_go_of_the_terminal()
        handler(number, frame)

    before = {number: signal.getsignal(number) for number in ASKING}
    hangup = getattr(signal, "SIGHUP", None)
    if before.get(hangup) is signal.SIG_IGN:
        del before[hangup]
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def leave_to_parent(but: Collection[int] = ()) -> None:
    """Ignore stop signals in a child process.

    Terminals and schedulers send signals to all processes; the parent ends its children.

    Args:
        but: Signals that still end this process.
    """
    signal.set_wakeup_fd(-1)  # of the parent, after a fork
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL if number in but else signal.SIG_IGN)


@contextmanager
def raising() -> Iterator[None]:
    """Raise ``Signalled`` on a signal; further ones during cleanup are ignored.

    Raises:
        Signalled: A signal came; or a second one, if the first had no effect.
    """
    requests, came = Requests(), False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal came
        insists = requests.insist(number)
        if insists or not came:
            came = True
            raise Signalled(number)

    with handling(stop):
        yield


class _CutShort(Signalled):
    """First signal during the wait for a batch."""


class Stop:
    """Received stop signal, if any."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._waiting = False
        self._requests = Requests()

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._requests.insist(number):
            raise Signalled(number)
        if self.signal_number is None:
            self.signal_number = number
            if self._waiting:
                self._waiting = False
                raise _CutShort(number)

    def cutting_short(self, items: Iterator[T]) -> Iterator[T | None]:
        """Yield items; a signal interrupts the wait for the next one, and None is the last."""
        while True:
            item, cut = None, False
            try:
                self._waiting = True
                item = next(items, None)
                self._waiting = False
            except _CutShort:
                cut = True
            except BaseException:
                self._waiting = False
                raise
            if item is None and not cut:
                return
            yield None if cut else item
            if cut:
                return


@contextmanager
def noting() -> Iterator[Stop]:
    """Record the first signal.

    Raises:
        Signalled: A second Ctrl-C or SIGTERM came.
    """
    stop = Stop()
    with handling(stop.note):
        yield stop


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Set ``kept()`` as the message on saved work if a signal stops the block."""
    _kept.append(kept)
    try:
        yield
    except Signalled as stop:
        stop.kept = stop.kept or _what_is_kept()
        raise
    finally:
        _kept.remove(kept)


def _what_is_kept() -> str:
    with suppress(Exception):  # the process ends: whatever is wrong with a file, it is not the news
        return _kept[-1]() if _kept else ""
    return ""


def _joined(message: str, kept: str) -> str:
    return f"{message}; {kept}" if kept else message


@contextmanager
def second_ends(say: Callable[[str], object]) -> Iterator[None]:
    """End the process at once on a second Ctrl-C or SIGTERM, even if the main thread is blocked.

    Python's own handlers run in the main thread, so they can't: a thread is told of each signal.

    Args:
        say: Shows a message.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = BackgroundThread(lambda: _watch(reader, say))
    try:
        with silent_thread_deaths():
            watch.start()
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")
        watch.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, say: Callable[[str], object]) -> None:
    requests = Requests()
    while number := os.read(reader, 1)[0]:
        if requests.insist(number):
            _end(number, say)


def _end(number: int, say: Callable[[str], object]) -> None:
    """End this process and its children, with a final message."""
    code = 128 + number

    def hurry() -> None:
        time.sleep(LAST_WORDS)
        os._exit(code)

    BackgroundThread(hurry).start()  # a disk or a pipe may hang
    with suppress(Exception):
        say(_joined(f"stopped at once by a second {name_of(number)}", _what_is_kept()))
        sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _let_go_of_the_terminal() -> None:
    """Redirect output to nowhere if the terminal was closed, since every write would fail."""
    try:
        import termios
    except ImportError:
        return
    for stream in (0, 1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, stream)
                os.close(nowhere)
