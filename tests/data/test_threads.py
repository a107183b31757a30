"""Work in threads: all of it, in order, or an error."""

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
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count


def test_threads_that_die_at_birth_leave_their_work_to_this_one(monkeypatch):
    monkeypatch.setattr(threads, "start_new_thread", lambda work, arguments: None)
    assert in_threads(lambda i: i * i, 0, 10) == [i * i for i in range(10)]


def test_threads_that_begin_late_find_nothing_to_do(monkeypatch):
    late = []
    monkeypatch.setattr(threads, "start_new_thread", lambda work, told: late.append((work, told)))
    done = []
    in_threads(done.append, 0, 10)
    for work, told in late:
        work(*told)
    assert done == list(range(10))


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_thread_that_can_not_be_started_is_done_without(monkeypatch, error):
    def refuse(*arguments):
        raise error

    monkeypatch.setattr(threads, "start_new_thread", refuse)
    assert in_threads(lambda i: i, 0, 10) == list(range(10))


def test_a_signal_ends_all_of_them(monkeypatch):
    def interrupted(work, arguments):
        start_new_thread(work, arguments)
        raise KeyboardInterrupt

    start_new_thread, done = threads.start_new_thread, []
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "start_new_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_threads(lambda i: done.append(time.sleep(0.001)), 0, 10_000)
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count < 5_000
