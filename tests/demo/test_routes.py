"""Routes that answer an image: one at a time, for those who wait, and nothing that has a name."""

import http.client
import json
import threading
from io import BytesIO
from urllib.parse import urlsplit

import numpy as np
import pytest
from demo_runs import TINY, untrained
from PIL import Image

pytest.importorskip("gradio", reason="the demo's extra is not installed")

from smallfry.demo import routes
from smallfry.demo.page import build_page, name_models
from smallfry.demo.routes import MOST_WAITING, Shown, answer
from smallfry.demo.serve import serving
from smallfry.training.run import load_run

PATIENCE = 600  # seconds after which a test takes something to hang
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("answers") / "run", **TINY | {"recursion_steps": 3})


def encoded(size=8, mode="L"):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "png")
    return file.getvalue()


class Asking:
    """A client that has sent an image and waits for the answer."""

    def __init__(self, address, path="/look", body=None):
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
        self.connection.request("POST", path, encoded() if body is None else body, OCTETS)

    def answer(self):
        response = self.connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if response.status == 200 else body.decode()

    def leave(self):
        self.connection.close()


class Slow:
    """An answer that takes as long as the test wants."""

    def __init__(self):
        self.begun, self.names, self.go = threading.Event(), [], threading.Event()

    def __call__(self, models, image, name):
        self.names.append(name)
        self.begun.set()
        assert self.go.wait(PATIENCE)
        return {"name": name}


@pytest.fixture
def slow(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(routes, "answer", slow)
    yield slow
    slow.go.set()


def settle(address):
    """Return once the server has taken notice of all that was sent before."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
    for _ in range(3):
        connection.request("GET", "/theme.css")
        connection.getresponse().read()
    connection.close()


def test_an_answer_has_every_moment_of_every_model(run, tmp_path):
    other = untrained(tmp_path / "other", name="resnet18_cifar", size=32, channels=3)
    models = [Shown(str(folder), load_run(folder)) for folder in (run, other)]
    answered = answer(models, encoded(40), "a <b>")
    assert "a &lt;b&gt;" in answered["status"]
    first, second = answered["panels"]
    assert (first["answer"], len(first["views"])) == (6, 7)
    assert (second["answer"], len(second["views"])) == (0, 1)
    assert first["picture"].startswith("data:image/png;base64,")
    assert 'src="#picture"' in first["views"][3]
    assert first["picture"] not in first["views"][3]


@pytest.mark.parametrize("body", [b"", b"text", encoded()[:50]])
def test_what_is_no_image_is_answered_with_a_message(run, body):
    answered = answer([Shown("run", load_run(run))], body, "it.png")
    assert answered["panels"] == []
    assert 'role="alert"' in answered["status"]
    assert "it.png: " in answered["status"]


def test_a_name_is_shown_and_nothing_else(run):
    with serving([str(run)]) as address:
        status, answered = Asking(address, "/look?name=/etc/passwd%00%3Cb%3E" + "x" * 500).answer()
        assert status == 200
        assert "/etc/passwd\0&lt;b&gt;xxx" in answered["status"]
        assert "x" * 200 not in answered["status"]
        assert len(answered["panels"]) == 1


def test_an_image_that_nobody_waits_for_is_dropped(run, slow):
    with serving([str(run)]) as address:
        first = Asking(address, "/look?name=first")
        assert slow.begun.wait(PATIENCE)
        abandoned = Asking(address, "/look?name=abandoned")
        settle(address)
        abandoned.leave()
        last = Asking(address, "/look?name=last")
        settle(address)
        slow.go.set()
        assert first.answer() == (200, {"name": "first"})
        assert last.answer() == (200, {"name": "last"})
    assert slow.names == ["first", "last"]


def test_few_may_wait_and_the_next_one_is_asked_to_come_again(run, slow):
    with serving([str(run)]) as address:
        waiting = [Asking(address, f"/look?name={number}") for number in range(MOST_WAITING)]
        settle(address)
        status, said = Asking(address).answer()
        assert (status, "try it again" in said) == (503, True)
        slow.go.set()
        assert [one.answer()[0] for one in waiting] == [200] * MOST_WAITING
        assert Asking(address).answer()[0] == 200
    assert len(slow.names) == MOST_WAITING + 1


def test_an_answer_keeps_nobody_from_the_page(run, slow):
    with serving([str(run)]) as address:
        asking = Asking(address)
        assert slow.begun.wait(PATIENCE)
        settle(address)
        slow.go.set()
        assert asking.answer()[0] == 200


def test_an_error_inside_is_printed_where_the_server_runs(run, monkeypatch, capsys):
    def fail(models, image, name):
        raise ValueError("a fault of ours")

    monkeypatch.setattr(routes, "answer", fail)
    with serving([str(run)]) as address:
        status, said = Asking(address).answer()
        assert (status, "please report it" in said) == (500, True)
        assert "a fault" not in said
    assert "ValueError: a fault of ours" in capsys.readouterr().err


# The page


def test_the_page_has_no_function_on_the_server(run):
    page = build_page([Shown("run", load_run(run))])
    assert len(page.fns) == 3
    assert [function.fn for function in page.fns.values()] == [None] * 3


def test_models_that_have_one_name_are_named_by_where_they_came_from(run, tmp_path):
    other = untrained(tmp_path / "other", name="resnet18_cifar", size=32, channels=3)
    vitrm, resnet = load_run(run), load_run(other)
    first, second = Shown("runs/a", vitrm), Shown("runs/b", vitrm)
    name = "vitrm_micro_patch4_8"
    assert name_models([first]) == [name]
    assert name_models([first, Shown("runs/a", resnet)]) == [name, "resnet18_cifar"]
    assert name_models([first, second]) == [f"{name} of runs/a", f"{name} of runs/b"]
    assert name_models([first, first]) == [f"1. {name} of runs/a", f"2. {name} of runs/a"]
