"""Web server of the demo: host, port, clean shutdown."""

import errno
import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType
from typing import Any

from smallfry.demo.examples import find_examples
from smallfry.deploy.pretrained import load_trained
from smallfry.errors import DemoError
from smallfry.io.background import BackgroundThread
from smallfry.training.run import require_classifier

STOP_SECONDS = 8  # for answers under way; clients that still have to send are not waited for


def serve(
    runs: Sequence[str],
    checkpoint: str = "best",
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
) -> None:
    """Serve the page of some runs until Ctrl-C or SIGTERM.

    Args:
        runs: Run folders, or checkpoint folders in them.
        checkpoint: ``best`` or ``last``.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        open_browser: Open the page there too.

    Raises:
        DemoError: The port is taken, or the host is none of this machine's.
        RunError: A run that can't be used.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    with serving(runs, checkpoint, host, port) as address, _handling_signals(on_signal):
        print(f"watch it think: {address}   (Ctrl-C stops)", flush=True)
        if not _is_loopback(host):
            print("everyone who can reach this machine can use the page", flush=True)
        if open_browser:
            webbrowser.open(address)
        stop.wait()
    print("stopped", flush=True)


@contextmanager
def serving(
    runs: Sequence[str], checkpoint: str = "best", host: str = "127.0.0.1", port: int = 0
) -> Iterator[str]:
    """Serve the page, and yield its address; see ``serve``."""
    models = [(str(run), load_trained(run, checkpoint)) for run in runs]
    for _, trained in models:
        require_classifier(trained)
    with _listening(host, port) as listener, _private_folder():
        from smallfry.demo.application import build_application

        hosts = {"localhost", "127.0.0.1", "::1", host} if _is_loopback(host) else None
        examples = find_examples(models[0][1], runs[0])
        with _running(build_application(models, examples, hosts), listener):
            yield _address(listener)


@contextmanager
def _handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


# The server


@contextmanager
def _running(app: Any, listener: socket.socket) -> Iterator[None]:
    import uvicorn

    from smallfry.demo.connections import BoundedConnection

    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        ws="none",
        lifespan="off",  # Gradio would start a queue, for functions that there are none of
        proxy_headers=False,
        server_header=False,
        log_level="critical",
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = BackgroundThread(lambda: server.run([listener]))
    try:
        begun = thread.start()
        while not server.started:
            if not begun or thread.wait(0.01):
                raise DemoError("the server of the demo did not start; please report it")
        yield
    finally:
        server.should_exit = True
        thread.wait(STOP_SECONDS + 2)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket on a host and port, before the seconds in which Gradio loads."""
    if not 0 <= port <= 65535:
        raise DemoError(f"port {port}: expected 1 to 65535, or 0 for any free port")
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise DemoError(
                f"port {port} of {host} is in use; choose another with --port, or use --port 0 "
                f"for a free one"
            ) from None
        reason = error.strerror or error
        raise DemoError(
            f"can't listen on {host}, port {port}: {reason}; --host must be an address of this "
            f"machine, "
            "such as 127.0.0.1, or 0.0.0.0 for all"
        ) from None
    try:
        yield listener
    finally:
        listener.close()


@contextmanager
def _private_folder() -> Iterator[None]:
    """Create a temporary folder for Gradio's files, and disable its telemetry."""
    with tempfile.TemporaryDirectory(prefix="smallfry-demo-") as folder:
        wanted = {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
