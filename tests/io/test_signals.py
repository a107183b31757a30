"""Signals end whatever runs: once in good order, twice at once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from smallfry.errors import Stopped
from smallfry.io import signals
from smallfry.io.signals import (
    ASKING,
    Requests,
    Signalled,
    keeping,
    noting,
    raising,
)
from smallfry_runtime import background

INT, TERM, HUP, USR1 = ASKING


@pytest.fixture(autouse=True)
def heeded():
    """Whoever started the tests may ignore signals, as nohup does."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ASKING[1:]}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("came", "insists"),
    [
        ([(TERM, 0.0)], False),
        ([(INT, 0.0), (INT, 2.0)], True),
        ([(INT, 0.0), (TERM, 2.0)], True),
        ([(TERM, 0.0), (TERM, 0.9)], False),  # of `timeout`, which sends it twice
        ([(INT, 0.0), (INT, 0.5), (INT, 1.1)], True),  # of an impatient person
        ([(HUP, 0.0), (HUP, 2.0)], False),
        ([(USR1, 0.0), (TERM, 100.0)], False),  # SLURM's warning, then its end
        ([(USR1, 0.0), (TERM, 100.0), (TERM, 102.0)], True),
    ],
)
def test_what_insists_is_a_second_interrupt_or_sigterm_and_no_echo(came, insists):
    times = iter([time for number, time in came if number in (INT, TERM)])
    requests = Requests(clock=lambda: next(times))
    assert [requests.insist(number) for number, _ in came][-1] == insists


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_an_exception_that_handlers_of_errors_let_through(number):
    before = signal.getsignal(number)
    cleaned = []

    def work():
        try:
            with contextlib.suppress(Exception):
                send(number)
        finally:
            send(number)  # in the middle of cleaning up
            cleaned.append(True)

    with pytest.raises(Signalled) as stop, raising():
        work()
    assert cleaned
    assert stop.value.signal_number == number
    assert str(stop.value) == f"stopped by {'Ctrl-C' if number == INT else number.name}"
    assert signal.getsignal(number) is before


def test_a_second_one_is_raised_again_where_the_first_had_no_effect(monkeypatch):
    monkeypatch.setattr(signals, "ECHO", 0.0)
    with raising():
        with contextlib.suppress(KeyboardInterrupt):
            send(TERM)
        with pytest.raises(Signalled):
            send(TERM)


def test_under_nohup_a_closed_terminal_stops_nothing():
    signal.signal(HUP, signal.SIG_IGN)
    with raising():
        send(HUP)
    assert signal.getsignal(HUP) is signal.SIG_IGN


def test_other_threads_set_no_handlers():
    found = []

    def work():
        with raising(), noting() as stop:
            found.append((signal.getsignal(TERM), stop.signal_number))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(signal.SIG_DFL, None)]


@pytest.mark.parametrize("number", ASKING)
def test_a_noted_signal_waits_for_the_step_and_a_second_one_does_not(number, monkeypatch):
    monkeypatch.setattr(signals, "ECHO", 0.0)
    with noting() as stop:
        send(number)
        assert stop.signal_number == number
        if number in (HUP, USR1):
            send(number)
            send(INT)
        with pytest.raises(Signalled):
            send(TERM)


def test_a_wait_for_the_next_item_is_cut_short_and_work_on_one_is_not():
    def items():
        yield 1
        send(TERM)
        yield pytest.fail("it was waited for")

    with noting() as stop:
        assert list(stop.cutting_short(items())) == [1, None]
    with noting() as stop:
        taken = []
        for item in stop.cutting_short(iter("ab")):
            send(USR1)  # while an item is worked on
            taken.append(item)
        assert taken == ["a", "b"]
        assert stop.signal_number == USR1


def test_an_error_while_waiting_leaves_later_signals_noted():
    def items():
        raise OSError("the disk")
        yield

    with noting() as stop:
        with pytest.raises(OSError, match="the disk"):
            list(stop.cutting_short(items()))
        send(TERM)
        assert stop.signal_number == TERM


def test_what_is_kept_is_said_by_what_kept_it_last():
    with pytest.raises(Signalled) as stop, keeping(lambda: "much"), keeping(lambda: "all"):
        raise Signalled(TERM)
    assert str(stop.value) == "stopped by SIGTERM; all"
    with pytest.raises(Signalled) as stop, keeping(lambda: 1 / 0):
        raise Signalled(TERM)
    assert str(stop.value) == "stopped by SIGTERM"


def test_a_stop_travels_to_another_process():
    import pickle

    stop = pickle.loads(pickle.dumps(Stopped(15, "saved")))
    assert (stop.signal_number, str(stop)) == (15, "saved")


def test_what_stops_the_first_process_is_no_error_of_the_others():
    from smallfry.training.processes import _told

    stop = _told(0, Signalled(TERM))
    assert isinstance(stop, Stopped)
    assert (stop.signal_number, str(stop)) == (TERM, "stopped by SIGTERM")


def test_a_run_goes_on_where_there_is_no_memory_for_the_watching_thread(monkeypatch):
    monkeypatch.setattr(background, "start_new_thread", lambda work, arguments: None)
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    said = []
    with signals.second_ends(said.append):
        pass
    assert said == []
    assert signal.set_wakeup_fd(before) == before


# At once, in processes of their own

WAITS = """
import multiprocessing, os, threading, time
from smallfry.io import signals
from smallfry.io.terminal import say
signals.ECHO = 0.0
signals.LAST_WORDS = {last_words}
def kept():
    {kept}
def note(number, frame):
    os.write(1, b"noted\\n")  # the next signal may come before a print has returned
if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: (signals.leave_to_parent(), time.sleep(1000)))
    with signals.second_ends(say), signals.handling(note), signals.keeping(kept):
        child.start()
        say(str(child.pid))
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()  # for ever: a handler's return does not end it
"""


def waiting(kept, last_words):
    script = WAITS.format(kept=kept, last_words=last_words)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    # a signal between Python's last look for one and the lock would not be handled before it
    asleep = 0
    while asleep < 5:
        time.sleep(0.01)
        asleep = asleep + 1 if state_of(process.pid) == "S" else 0
    return process, child


def has_ended(pid):
    """Wait for the end of a process that has been killed."""
    for _ in range(6000):
        if not is_running(pid):
            return True
        time.sleep(0.01)
    return False


def is_running(pid):
    try:
        return state_of(pid) != "Z"
    except FileNotFoundError:
        return False


def state_of(pid):
    """State of a process's main thread, such as S where it sleeps."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for a process in /proc")
@pytest.mark.parametrize("number", [INT, TERM])
def test_a_second_signal_ends_what_waits_for_ever_and_its_children(number):
    process, child = waiting("return 'step 3 is saved'", last_words=600)
    for _ in range(2):  # a child's copy of the pipe is the same pipe: one word each is all
        process.send_signal(HUP)
        assert process.stdout.readline() == "noted\n"
    process.send_signal(number)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(number)
    name = "Ctrl-C" if number == INT else "SIGTERM"
    rest = process.stdout.read()
    assert f"stopped at once by a second {name}; step 3 is saved\n" in rest
    assert process.wait() == 128 + number
    assert has_ended(child)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for a process in /proc")
@pytest.mark.parametrize("kept", ["time.sleep(1000)", "raise OSError('gone')"])
def test_nothing_that_is_said_keeps_it_from_ending(kept):
    process, child = waiting(kept, last_words=0.5)
    process.send_signal(TERM)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(TERM)
    assert process.wait() == 128 + TERM
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # where there was no time for it
    process.stdout.close()


def test_who_works_for_another_leaves_signals_to_it():
    code = (
        "import signal, os; from smallfry.io.signals import *\n"
        "leave_to_parent(but=(signal.SIGTERM,))\n"
        "[os.kill(os.getpid(), n) for n in ASKING if n != signal.SIGTERM]\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -TERM
