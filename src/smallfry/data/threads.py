"""Thread pool for images whose threads can't block the exit of the process."""

import os
from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Callable
from typing import TypeVar, cast

from smallfry_runtime.background import silent_thread_deaths

Result = TypeVar("Result")
_MISSING = object()


def in_threads(do: Callable[[int], Result], start: int, stop: int) -> list[Result]:
    """Call ``do`` for every number from ``start`` to below ``stop`` on all cores, in order.

    This thread works too, and no other is waited for before it has begun: without memory one may
    die at birth, for which ``Thread.start`` and ``ThreadPoolExecutor`` would wait for ever.

    Raises:
        MemoryError: A thread ended before its work was done.
        Exception: The first that ``do`` raised; the other threads then stop too.
    """
    results: list[object] = [_MISSING] * (stop - start)
    errors: list[BaseException] = []
    begun: list[LockType] = []
    left = iter(range(start, stop))  # threads may share it, as taking one number is one step
    ended = False

    def work() -> None:
        try:
            for number in left:
                if errors or ended:
                    return
                results[number - start] = do(number)
        except BaseException as error:
            errors.append(error)

    def help_out(done: LockType) -> None:
        try:
            begun.append(done)
            work()
        finally:
            done.release()

    with silent_thread_deaths():
        try:
            for _ in range(min(os.cpu_count() or 1, stop - start) - 1):
                done = allocate_lock()
                done.acquire()
                try:
                    start_new_thread(help_out, (done,))
                except (RuntimeError, MemoryError):
                    break  # there is no room for more: fewer will do
            work()
        except BaseException:  # a signal
            ended = True
            raise
        finally:
            for each in begun:  # who begins later finds nothing left to do
                each.acquire()
    if errors:
        raise errors[0]
    if any(result is _MISSING for result in results):
        raise MemoryError("a thread ended before its work was done")
    return cast(list[Result], results)
