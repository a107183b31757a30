"""Serving the demo: ports, hosts, bounds, and how it stops."""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
from demo_runs import TINY, untrained

from smallfry.cli import main
from smallfry.demo.guard import Guard
from smallfry.demo.serve import serving
from smallfry.errors import DemoError

pytest.importorskip("gradio", reason="the demo's extra is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(untrained(tmp_path_factory.mktemp("serve") / "model", **TINY))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_nothing_stays(model, monkeypatch, capsys, tmp_path, number):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened = []

    def look(address):
        opened.append((address, httpx.get(address).status_code, len(list(tmp_path.iterdir()))))
        os.kill(os.getpid(), number)

    monkeypatch.setattr("webbrowser.open", look)
    before = signal.getsignal(number)
    assert main(["demo", model, "--host", "0.0.0.0", "--port", "0", "--open"]) == 0
    [(address, status, folders)] = opened
    assert (status, folders) == (200, 1)
    said = capsys.readouterr().out
    assert address in said
    assert "everyone who reaches this machine" in said
    assert said.endswith("stopped\n")
    assert signal.getsignal(number) is before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_a_port_in_use_is_an_error_that_says_what_to_do(model, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", model, "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"port {port}" in said
    assert "in use" in said
    assert "--port 0" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port 70000"),
        (["--host", "203.0.113.7"], "can't listen on 203.0.113.7"),
        (["--host", "no such host"], "can't listen on no such host"),
    ],
)
def test_a_place_to_listen_that_there_is_not_is_an_error(model, capsys, options, message):
    assert main(["demo", model, *options]) == 1
    assert message in capsys.readouterr().err


def test_a_broken_run_is_an_error(model, tmp_path, capsys):
    assert main(["demo", str(tmp_path / "none")]) == 1
    assert "there is no such run folder" in capsys.readouterr().err
    assert main(["demo", model, str(tmp_path)]) == 1
    assert "not a run folder" in capsys.readouterr().err


def test_without_gradio_it_says_how_to_get_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "smallfry.demo.page", raising=False)
    with pytest.raises(DemoError, match=r"pip install 'smallfry\[demo\]'"), serving([model]):
        pass


def test_the_environment_is_as_it_was_and_uploads_are_private(model, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "elsewhere")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    with serving([model]) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o077 == 0
        files = {"files": ("a.png", b"x" * 1000)}
        [path] = httpx.post(f"{address}gradio_api/upload", files=files).json()
        assert Path(path).is_relative_to(folder)
    assert not folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "elsewhere"
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ


def test_only_the_page_is_served_and_uploads_are_bounded(model, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with serving([model]) as address, httpx.Client(base_url=address) as client:
        assert client.get("/").status_code == 200
        for path in (secret, "/etc/hostname", Path(model) / "manifest.json"):
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
        assert client.get("/", headers={"host": "rebound.example"}).status_code == 421
        assert client.get("/openapi.json").status_code == 404
        assert client.get("/gradio_api/info").json()["named_endpoints"] == {}
        upload = {"files": ("big.png", b"x" * (20 * 2**20 + 1))}
        assert client.post("/gradio_api/upload", files=upload).status_code == 413


def test_another_host_is_let_in_only_when_told(model):
    with serving([model], host="0.0.0.0") as address:
        answered = httpx.get(address, headers={"host": "my-machine.example"})
        assert answered.status_code == 200
    with serving([model]) as address:
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        with socket.socket() as other:  # loopback has other addresses than ours on Linux
            assert other.connect_ex(("127.0.0.2", port)) != 0


# The guard by itself


def ask(guard, chunks, **headers):
    """The status and the headers of the answer to a request, and how many chunks were read."""
    scope = {"type": "http", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    waiting[-1]["more_body"] = False
    sent = []

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    return starts[0]["status"], dict(starts[0]["headers"]), len(chunks) - len(waiting)


async def reads_all(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_the_guard_lets_through_what_is_within_bounds_and_adds_the_policy():
    status, headers, _ = ask(Guard(reads_all, 100), [b"x" * 60, b"x" * 40])
    assert status == 200
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'")


def test_the_guard_refuses_a_body_that_says_or_turns_out_to_be_too_long():
    guard = Guard(reads_all, 100)
    assert ask(guard, [b""], **{"content-length": "101"})[::2] == (413, 0)
    assert ask(guard, [b""], **{"content-length": "-1"})[::2] == (413, 0)
    status, _, read = ask(guard, [b"x" * 60] * 10)
    assert (status, read) == (413, 2)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:7860", 200),
        ("127.0.0.1", 200),
        ("[::1]:7860", 200),
        ("rebound.example:7860", 421),
        ("localhost.example", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_the_guard_answers_to_its_own_names_only(host, status):
    guard = Guard(reads_all, 100, {"localhost", "127.0.0.1", "::1"})
    assert ask(guard, [b""], host=host)[0] == status
