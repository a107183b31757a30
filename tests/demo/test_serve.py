"""Serving the demo: ports, hosts, bounds, and how it stops."""

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
from smallfry.demo.serve import serving

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
    assert "everyone who can reach this machine" in said
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
    assert "there is no such file or folder" in capsys.readouterr().err
    assert main(["demo", model, str(tmp_path)]) == 1
    assert "the folder is empty; expected a run folder" in capsys.readouterr().err


def test_without_gradio_the_error_names_what_to_install(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for module in ("application", "page"):
        monkeypatch.delitem(sys.modules, f"smallfry.demo.{module}", raising=False)
    assert main(["demo", model, "--port", "0"]) == 1
    assert "gradio is needed here and not installed: pip install 'smallfry[demo]'" in (
        capsys.readouterr().err
    )


def test_the_environment_is_as_it_was(model, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "elsewhere")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    with serving([model]):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o077 == 0
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] in ("1", "True")  # Gradio sets it too
    assert not folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "elsewhere"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ


def test_another_host_is_let_in_only_when_told(model):
    with serving([model], host="0.0.0.0") as address:
        answered = httpx.get(address, headers={"host": "my-machine.example"})
        assert answered.status_code == 200
    with serving([model]) as address:
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        with socket.socket() as other:  # loopback has other addresses than ours on Linux
            assert other.connect_ex(("127.0.0.2", port)) != 0
