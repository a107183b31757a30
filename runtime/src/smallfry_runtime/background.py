"""Background threads with bounded waits."""

import sys
from _thread import allocate_lock, get_ident, start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class BackgroundThread:
    """Thread with a bounded start, never blocking the exit of the process.

    Without memory a thread may die before its first instruction. ``threading.Thread.start`` and
    ``join`` would wait for it forever.

    Args:
        work: The function to call in the thread.

    Example:
        >>> results = []
        >>> thread = BackgroundThread(lambda: results.append(1))
        >>> thread.start()
        True
        >>> while not thread.wait(1.0):
        ...     pass
        >>> results
        [1]
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._gate, self._running = allocate_lock(), allocate_lock()
        self._cancelled = False
        self.ident: int | None = None  # once it has begun

    def start(self) -> bool:
        """Start the thread; return whether the system had room for one."""
        self._running.acquire()
        try:
            start_new_thread(self._run, ())
        except (RuntimeError, MemoryError):
            self._cancelled = True
            self._running.release()
            return False
        return True

    def is_alive(self) -> bool:
        """Return whether the thread has begun and not ended."""
        return self.ident is not None and self._running.locked()

    def wait(self, seconds: float) -> bool:
        """Wait for the thread's end for at most so many seconds; return whether it has ended."""
        ended = self._running.acquire(timeout=seconds)
        if ended:
            self._running.release()
        return ended

    def join(self) -> None:
        """Wait for the thread's end; one that has not begun never will."""
        with self._gate:
            self._cancelled = True
            begun = self.ident is not None
        if begun:
            with self._running:
                pass

    def _run(self) -> None:
        try:
            with self._gate:
                if self._cancelled:
                    return
                self.ident = get_ident()
            self._work()
        finally:
            self._running.release()


@contextmanager
def silent_thread_deaths() -> Iterator[None]:
    """Hide the tracebacks of threads that find no memory to begin."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is not MemoryError:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
