"""Connections that end, whatever a client does not send or read."""

import asyncio
import contextlib
import socket
import threading
import time
from itertools import islice
from unittest.mock import MagicMock

import pytest

pytest.importorskip("uvicorn", reason="the serve extra is not installed")

from smallfry_runtime.serving import listening as of_servers
from smallfry_runtime.serving import server as serving_module
from smallfry_runtime.serving.connections import BoundedConnection
from smallfry_runtime.serving.limits import Limits
from smallfry_runtime.serving.listening import listening, running

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LONG = 64 * 2**20  # more than the buffers of two sockets hold
PATIENCE = 600  # seconds after which a test takes something to hang


@contextlib.contextmanager
def server(monkeypatch, finished=None, slowly=None, **bounds):
    """The address of a server whose bounds are other ones.

    Args:
        finished: Set when an answer ends.
        slowly: Two events: a request has come, and it is to be answered.
    """
    for name, value in bounds.items():
        monkeypatch.setattr(BoundedConnection, name, value)

    async def application(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
            if slowly is not None:
                slowly[0].set()
                await asyncio.to_thread(slowly[1].wait, PATIENCE)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            length = LONG if scope["path"] == "/long" else 2
            for begin in range(0, length, 2**16):
                piece = b"ok" * ((min(length - begin, 2**16)) // 2)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            if finished is not None:
                finished.set()

    with listening("127.0.0.1", 0) as listener, running(application, listener):
        yield listener.getsockname()


def connect(address):
    return socket.create_connection(address, timeout=PATIENCE)


def is_cut_off(connection):
    """Wait for the end of a connection on which no whole answer comes."""
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(2**20):
            received += len(chunk)
    return received < LONG


def answered(connection):
    connection.sendall(REQUEST)
    answer = b""
    while not answer.endswith(b"0\r\n\r\n"):
        if not (received := connection.recv(4096)):
            return False
        answer += received
    return answer.startswith(b"HTTP/1.1 200 OK") and b"ok" in answer


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a"])
def test_a_request_that_is_not_finished_is_given_up(monkeypatch, begun):
    with server(monkeypatch, head_seconds=0.2) as address, connect(address) as connection:
        connection.sendall(begun)
        assert is_cut_off(connection)


def test_a_request_that_comes_byte_by_byte_is_given_up_all_the_same(monkeypatch):
    with server(monkeypatch, head_seconds=0.3) as address, connect(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() < end


def test_a_connection_that_was_kept_alive_has_the_same_deadline(monkeypatch):
    with server(monkeypatch, head_seconds=PATIENCE) as address, connect(address) as connection:
        assert answered(connection)
        assert answered(connection)
        monkeypatch.setattr(BoundedConnection, "head_seconds", 0.3)
        connection.sendall(b"GET / HT")
        assert is_cut_off(connection)


def test_an_answer_that_is_not_read_is_given_up(monkeypatch):
    finished = threading.Event()
    opened = server(monkeypatch, finished, request_seconds=0.3)
    with opened as address, connect(address) as connection:
        connection.sendall(REQUEST.replace(b"/ ", b"/long "))
        assert finished.wait(PATIENCE)
        assert is_cut_off(connection)


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET / HT",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx",
        b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_clients_who_neither_send_nor_read_keep_nobody_out(monkeypatch, begun):
    with server(monkeypatch, head_seconds=PATIENCE, most_connections=5) as address:
        late = []
        for _ in range(30):
            late.append(connect(address))
            late[-1].sendall(begun)
        # while all others are still being answered, the newest client is the only late one
        is_answered, end = False, time.monotonic() + PATIENCE
        while not is_answered and time.monotonic() < end:
            with contextlib.suppress(ConnectionError), connect(address) as connection:
                is_answered = answered(connection)
        assert is_answered
        # while an answer is being written its client is not late, so that a later one is cut off
        asked = late if b"/long" in begun else late[:20]
        assert len(list(islice(filter(is_cut_off, asked), 20))) == 20
        for one in late:
            one.close()


def test_an_answer_under_way_is_sent_before_the_server_stops(monkeypatch):
    asked, answer = threading.Event(), threading.Event()
    with contextlib.ExitStack() as stack:
        with server(monkeypatch, slowly=(asked, answer)) as address:
            connection = stack.enter_context(connect(address))
            connection.sendall(REQUEST)
            assert asked.wait(PATIENCE)
            threading.Timer(1.5, answer.set).start()  # when it stops already
        received = b""
        while chunk := connection.recv(4096):
            received += chunk
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert received.endswith(b"ok\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"],
)
def test_a_server_that_stops_waits_for_no_request(monkeypatch, begun):
    monkeypatch.setattr(of_servers, "STOP_SECONDS", PATIENCE)
    with contextlib.ExitStack() as stack:
        with server(monkeypatch) as address:
            late = [stack.enter_context(connect(address)) for _ in range(3)]
            for one in late:
                one.sendall(begun)
            assert answered(stack.enter_context(connect(address)))
            stops = time.monotonic()
        assert time.monotonic() - stops < PATIENCE
        assert all(is_cut_off(one) for one in late)


@pytest.mark.parametrize(("most", "waited"), [(3.0, 8.0), (30.0, 31.0)])
def test_a_server_that_stops_waits_as_long_as_an_answer_may_take(monkeypatch, most, waited):
    given = []

    @contextlib.contextmanager
    def running(app, listener, seconds):
        given.append(seconds)
        yield

    monkeypatch.setattr(serving_module, "running", running)
    monkeypatch.setattr(serving_module, "Service", lambda *_: MagicMock())
    with serving_module.serving(MagicMock(), limits=Limits(seconds=most)):
        pass
    assert given == [waited]
