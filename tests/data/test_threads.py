"""Work in threads: all of it, in order, or an error."""

import threading
import time

import pytest

from smallfry.data import threads
from smallfry.data.threads import in_threads


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (3, 500)])
def test_every_number_is_worked_on_once_and_results_are_in_order(start, stop):
    seen = []
    squares = in_threads(lambda i: seen.append(i) or i * i, start, stop)
    assert squares == [i * i for i in range(start, stop)]
    assert sorted(seen) == list(range(start, stop))


def test_an_error_is_raised_and_the_rest_is_left():
    done = []

    def work(i):
        if i == 5:
            raise MemoryError("full")
        time.sleep(0.001)
        done.append(i)

    with pytest.raises(MemoryError, match="full"):
        in_threads(work, 0, 10_000)
    assert len(done) < 5_000
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(work)")]


def test_threads_that_end_without_a_word_are_no_wait_for_ever(monkeypatch):
    class Lost(threading.Thread):
        def run(self):
            """Ends where it finds no memory."""

    monkeypatch.setattr(threads, "Thread", Lost)
    with pytest.raises(MemoryError, match="before its work was done"):
        in_threads(lambda i: i, 0, 10)


def test_a_thread_that_can_not_be_started_is_told(monkeypatch):
    class Refused(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "Thread", Refused)
    with pytest.raises(RuntimeError, match="can't start"):
        in_threads(lambda i: i, 0, 10)
