"""Background threads: nothing waits for one that died before it began."""

import subprocess
import sys
import threading
import time

import pytest

import smallfry_runtime.background as background
from smallfry_runtime.background import BackgroundThread, silent_thread_deaths


def test_work_is_done_in_another_thread():
    idents = []
    thread = BackgroundThread(lambda: idents.append(threading.get_ident()))
    assert not thread.is_alive()
    assert thread.start()
    thread.wait(60)
    thread.join()
    assert idents == [thread.ident]
    assert idents != [threading.get_ident()]
    assert not thread.is_alive()


def test_waiting_has_a_limit_and_joining_has_none():
    go, done = threading.Event(), []
    thread = BackgroundThread(lambda: go.wait(60) and done.append(1))
    assert thread.start()
    assert not thread.wait(0.01)
    go.set()
    assert thread.wait(60)
    thread.join()
    assert done == [1]
    assert thread.wait(0)


def test_a_thread_that_dies_before_it_begins_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(background, "start_new_thread", lambda work, arguments: None)
    thread = BackgroundThread(lambda: None)
    assert thread.start()
    assert not thread.is_alive()
    assert not thread.wait(0.01)
    thread.join()


def test_a_thread_that_begins_after_the_join_does_nothing(monkeypatch):
    late, done = [], []
    monkeypatch.setattr(background, "start_new_thread", lambda work, arguments: late.append(work))
    thread = BackgroundThread(lambda: done.append(1))
    thread.start()
    thread.join()
    late[0]()
    assert done == []
    assert thread.wait(0)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_without_room_for_a_thread_start_returns_false(monkeypatch, error):
    def refuse(*arguments):
        raise error

    monkeypatch.setattr(background, "start_new_thread", refuse)
    thread = BackgroundThread(lambda: None)
    assert not thread.start()
    assert thread.wait(0)
    thread.join()


def test_a_thread_that_was_not_started_can_be_joined():
    BackgroundThread(lambda: None).join()


def test_the_process_ends_beside_a_thread_that_does_not():
    code = (
        "import time; from smallfry_runtime.background import BackgroundThread;"
        "BackgroundThread(lambda: time.sleep(10**6)).start(); print('end')"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout) == (0, "end\n")


def test_errors_of_threads_are_printed_except_those_of_missing_memory(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.exc_type))

    def fail(error):
        raise error

    with silent_thread_deaths():
        for error in (MemoryError(), ValueError()):
            thread = BackgroundThread(lambda error=error: fail(error))
            assert thread.start()
            assert thread.wait(600)
            until = time.monotonic() + 600  # the error is printed after the thread's end
            while isinstance(error, ValueError) and not seen and time.monotonic() < until:
                time.sleep(0.001)
    assert seen == [ValueError]


STARVED = """
import os, random, resource, threading
from smallfry_runtime.background import BackgroundThread, silent_thread_deaths

def address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

def starve(spare):
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + spare,) * 2)
    kept = []
    for size in (2**14, 300):
        try:
            while True:
                kept.append(bytearray(size))
        except MemoryError:
            pass
    del kept[-20:]
    with silent_thread_deaths():
        thread = BackgroundThread(lambda: None)
        thread.start()
        thread.join()

threading.stack_size(2**16)
spares = random.Random(1)
for _ in range(40):
    spare = spares.randrange(400_000)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            starve(spare)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
print("none hangs")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_no_start_hangs_without_memory():
    """With ``threading.Thread`` about one in fifteen of these children never ends."""
    command = [sys.executable, "-c", STARVED]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout) == (0, "none hangs\n"), ended.stderr
