"""The same for many images, in threads that can't leave the process waiting."""

import os
from collections.abc import Callable
from threading import Thread
from typing import TypeVar, cast

Result = TypeVar("Result")
_MISSING = object()


def in_threads(do: Callable[[int], Result], start: int, stop: int) -> list[Result]:
    """``do`` of every number from ``start`` to below ``stop``, on all cores, in their order.

    ``ThreadPoolExecutor`` loses a thread that finds no memory between two pieces of work: it prints
    a traceback, and once all are lost it waits for ever.

    Raises:
        MemoryError: A thread ended before its work was done.
        Exception: The first that ``do`` raised; the other threads then stop too.
    """
    results: list[object] = [_MISSING] * (stop - start)
    errors: list[BaseException] = []
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

    threads: list[Thread] = []
    try:
        for _ in range(min(os.cpu_count() or 1, stop - start)):
            thread = Thread(target=work)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()
    finally:  # also when a signal ends the wait, or no thread can be started
        ended = True
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    if any(result is _MISSING for result in results):
        raise MemoryError("a thread ended before its work was done")
    return cast(list[Result], results)
