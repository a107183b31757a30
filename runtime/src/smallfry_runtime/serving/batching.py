"""Batching of simultaneous requests."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import SmallfryError

Outputs = TypeVar("Outputs")
Pixels = NDArray[Any]


class Busy(SmallfryError):
    """Refused call: too many images are waiting already."""


class Late(SmallfryError):
    """Call without an answer in time."""


class _Call(NamedTuple):
    pixels: Pixels
    deadline: float
    outputs: "Future[Any]"


class Batcher(Generic[Outputs]):
    """Model behind batches of simultaneous calls.

    A batch is what has arrived while the last one was computed: a call on an idle server waits for
    nothing. Calls come from any threads; the model runs in one.

    Args:
        run: From pixels (images, channels, height, width) to outputs: arrays of a row for each
            image, in named tuples or dictionaries; those that a model lacks may be None.
        most_images: Images of a batch; a single call may have more.
        most_waiting: Images that may wait; further calls are refused.
        observe: Called with the number of images of each batch.

    Example:
        >>> import numpy as np
        >>> batcher = Batcher(lambda pixels: pixels.mean((2, 3)) / 255)
        >>> batcher(np.full((2, 1, 8, 8), 255, np.uint8))
        array([[1.],
               [1.]])
        >>> batcher.close()
    """

    def __init__(
        self,
        run: Callable[[Pixels], Outputs],
        most_images: int = 64,
        most_waiting: int = 256,
        observe: Callable[[int], Any] = lambda images: None,
    ) -> None:
        self._run = run
        self._most_images = most_images
        self._most_waiting = most_waiting
        self._observe = observe
        self._calls: deque[_Call] = deque()
        self._lock, self._closed = Lock(), False
        self._worker = ThreadPoolExecutor(1, "batches")
        self.waiting = 0  # images

    def __call__(self, pixels: Pixels, seconds: float = 60.0) -> Outputs:
        """Compute outputs, in a batch with those of other calls.

        Args:
            pixels: (images, channels, height, width), at least one.
            seconds: Time after which the call is dropped.

        Raises:
            Busy: Too many images wait already, or the batcher is closed.
            Late: There were no outputs in time.
        """
        call = _Call(pixels, time.monotonic() + seconds, Future())
        with self._lock:
            if self._closed:
                raise Busy("the server is stopping")
            if self.waiting and self.waiting + len(pixels) > self._most_waiting:
                raise Busy(f"{self.waiting} images are waiting already; try again later")
            self._calls.append(call)
            self.waiting += len(pixels)
            self._worker.submit(self._compute)
        try:
            outputs: Outputs = call.outputs.result(seconds)
            return outputs
        except TimeoutError:
            call.outputs.cancel()  # which a batch that has begun does not see
            raise Late(f"no answer within {seconds:g} s") from None

    def close(self) -> None:
        """Compute what is waiting, and end the thread; further calls are refused."""
        with self._lock:
            self._closed = True
        self._worker.shutdown()

    def _compute(self) -> None:
        """Compute one batch, unless an earlier one had the call that this was started for."""
        if not (calls := self._next()):
            return
        try:
            outputs = self._run(np.concatenate([call.pixels for call in calls]))
            ends = np.cumsum([len(call.pixels) for call in calls])
            starts = [0, *ends[:-1]]
            parts = [_rows(outputs, *at) for at in zip(starts, ends, strict=True)]
        except BaseException as error:
            for call in calls:
                call.outputs.set_exception(error)
            return
        self._observe(int(ends[-1]))
        for call, part in zip(calls, parts, strict=True):
            call.outputs.set_result(part)

    def _next(self) -> list[_Call]:
        """Take calls off the queue, up to the images of a batch; those given up are left out."""
        taken: list[_Call] = []
        count, now = 0, time.monotonic()
        with self._lock:
            while self._calls:
                size = len(self._calls[0].pixels)
                if taken and count + size > self._most_images:
                    break
                call = self._calls.popleft()
                self.waiting -= size
                if call.deadline > now and call.outputs.set_running_or_notify_cancel():
                    taken.append(call)
                    count += size
        return taken


def _rows(outputs: Any, start: int, end: int) -> Any:
    """Cut rows out of arrays, and out of named tuples and dictionaries of them."""
    if isinstance(outputs, dict):
        return {name: _rows(part, start, end) for name, part in outputs.items()}
    if isinstance(outputs, tuple):
        return type(outputs)(*(_rows(part, start, end) for part in outputs))
    return None if outputs is None else outputs[start:end]
