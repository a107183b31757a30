"""Listening socket and server thread: host, port, clean shutdown."""

import errno
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType
from typing import Any

from smallfry_runtime.background import BackgroundThread
from smallfry_runtime.errors import ServerError

STOP_SECONDS = 8  # for answers in progress; clients that still have to send are not waited for


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket on a host and port.

    Args:
        host: An address of this machine.
        port: The port; 0 takes a free one.

    Raises:
        ServerError: The port is taken, or the host is none of this machine's.
    """
    if not 0 <= port <= 65535:
        raise ServerError(f"port {port}: expected 1 to 65535, or 0 for any free port")
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # of a named protocol, or asyncio leaves Nagle's algorithm on: 40 ms an answer
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServerError(
                f"port {port} of {host} is in use; choose another with --port, or use --port 0 "
                f"for a free one"
            ) from None
        reason = error.strerror or error
        raise ServerError(
            f"can't listen on {host}, port {port}: {reason}; --host must be an address of this "
            f"machine, "
            "such as 127.0.0.1, or 0.0.0.0 for all"
        ) from None
    try:
        yield listener
    finally:
        listener.close()


@contextmanager
def running(app: Any, listener: socket.socket, seconds: float | None = None) -> Iterator[None]:
    """Run an ASGI application in a thread, with deadlines for all requests.

    Args:
        app: The application.
        listener: The socket.
        seconds: Most time for answers in progress when it ends; default ``STOP_SECONDS``.
    """
    import uvicorn

    from smallfry_runtime.serving.connections import BoundedConnection

    most = math.ceil(STOP_SECONDS if seconds is None else seconds)
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        log_level="critical",
        timeout_graceful_shutdown=most,
    )
    server = uvicorn.Server(config)
    thread = BackgroundThread(lambda: server.run([listener]))
    try:
        begun = thread.start()
        while not server.started:
            if not begun or thread.wait(0.01):
                raise ServerError("the server did not start; please report it")
        yield
    finally:
        server.should_exit = True
        thread.wait(most + 2)


@contextmanager
def until_stopped() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    with _handling(on_signal):
        yield stop


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def address(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def is_loopback(host: str) -> bool:
    """Return whether a host name can only be reached from this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def known_hosts(host: str) -> set[str] | None:
    """Return the names that a loopback server is asked for by; None for any elsewhere."""
    return {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else None
