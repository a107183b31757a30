"""The HTTP server as clients meet it: answers, limits, wrong requests, shutdown."""

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from smallfry_runtime import Runtime
from smallfry_runtime.errors import ServerError, UsageError
from smallfry_runtime.serving import __main__ as command
from smallfry_runtime.serving.limits import Limits
from smallfry_runtime.serving.listening import listening
from smallfry_runtime.serving.server import serving

httpx = pytest.importorskip("httpx", reason="httpx is not installed, which gradio brings")
pytest.importorskip("prometheus_client", reason="the serve extra is not installed")

EXPORT = Path(__file__).parents[2] / "fixtures" / "format_2" / "exports" / "float32"


def picture(seed=0, kind="PNG", size=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def runtime():
    return Runtime(EXPORT, threads=1)


@pytest.fixture(scope="module")
def client(runtime):
    limits = Limits(images=4, megabytes=0.2, seconds=30.0)
    with serving(runtime, limits=limits) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def classes(runtime, encoded, top_k=3):
    probabilities = runtime.predict([encoded]).probabilities[0]
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [(runtime.classes[i], pytest.approx(float(probabilities[i]), abs=1e-5)) for i in order]


def top(prediction):
    return [(each["class"], each["probability"]) for each in prediction["top"]]


def test_a_body_is_classified_as_the_runtime_does(client, runtime):
    response = client.post("/predict", content=picture(1))
    assert response.status_code == 200
    (found,) = response.json()["predictions"]
    assert top(found) == classes(runtime, picture(1))
    assert found["image"] == "image"
    assert found["class"] == found["top"][0]["class"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_a_form_is_classified_file_by_file(kind, client, runtime):
    pictures = [picture(seed, kind, 16) for seed in range(3)]
    files = [("image", (f"{n}.bin", content)) for n, content in enumerate(pictures)]
    found = client.post("/predict?top_k=2", files=files).json()["predictions"]
    assert [each["image"] for each in found] == ["0.bin", "1.bin", "2.bin"]
    assert [top(each) for each in found] == [classes(runtime, each, 2) for each in pictures]


def test_more_classes_than_there_are_give_all(client, runtime):
    (found,) = client.post("/predict?top_k=999", content=picture()).json()["predictions"]
    assert len(found["top"]) == len(runtime.classes)
    assert sum(share for _, share in top(found)) == pytest.approx(1.0, abs=1e-4)


def test_the_page_describes_the_model_and_the_limits(client, runtime):
    found = client.get("/").json()
    assert found["classes"] == list(runtime.classes)
    assert found["image"] == {"size": 8, "channels": 1, "resize": "crop"}
    assert found["limits"]["images"] == 4
    assert "curl" in found["help"]
    assert client.get("/health").json() == {"status": "ok", "waiting_images": 0}


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b""}, 400, "no image: send one as the body"),
        ({"content": b"text"}, 400, "not an image, or in an unsupported format"),
        ({"content": picture()[:60]}, 400, "damaged"),
        ({"content": bytes(300_000)}, 413, "the limit is 200,000 bytes"),
        ({"content": iter([bytes(100_000)] * 3)}, 413, "the limit is 200,000 bytes"),
        ({"files": [("image", ("a.png", picture()))] * 5}, 400, "Maximum number of files is 4"),
        ({"files": {"image": ("a.png", b"no")}}, 400, "a.png: not an image"),
        ({"data": {"image": "x"}, "files": {"i": ("a", picture())}}, 400, "and nothing else"),
        ({"content": picture(), "params": {"top_k": "0"}}, 400, "top_k must be a whole number"),
        ({"content": picture(), "params": {"top_k": "-1"}}, 400, "top_k must be a whole number"),
        ({"content": picture(), "params": {"top_k": "²"}}, 400, "top_k must be a whole number"),
        ({"content": picture(), "headers": {"origin": "http://evil"}}, 403, "other sites"),
        ({"content": picture(), "headers": {"host": "evil.example"}}, 421, "own machine"),
    ],
)
def test_a_wrong_request_is_refused_with_a_reason(request_, status, message, client):
    response = client.post("/predict", **request_)
    assert response.status_code == status
    assert message in response.json()["error"]
    assert client.post("/predict", content=picture()).status_code == 200


def test_a_broken_form_is_refused_and_not_logged(client, capsys):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for body in (b"--x\r\nnonsense", b"", b"--y\r\n\r\n--y--"):
        assert client.post("/predict", content=body, headers=headers).status_code == 400
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("PUT", "/predict", 405),
        ("POST", "/health", 405),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/docs", 404),
    ],
)
def test_nothing_else_is_served(method, path, status, client):
    response = client.request(method, path)
    assert response.status_code == status
    assert [*response.json()] == ["error"]


def test_a_load_balancer_can_look_at_the_head_alone(client):
    response = client.head("/health")
    assert (response.status_code, response.content) == (200, b"")
    assert client.get("/health").status_code == 200


def test_metrics_count_requests_and_images(runtime):
    with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as client:
        client.post("/predict", files=[("a", ("a", picture())), ("b", ("b", picture(1)))])
        client.post("/predict", content=b"no")
        client.get("/predict")
        client.get("/health")
        text = client.get("/metrics").text
    values = dict(re.findall(r'^smallfry_(\w+(?:\{status="\d+"\})?) ([\d.]+)$', text, re.M))
    assert values['requests_total{status="200"}'] == "1.0"
    assert values['requests_total{status="400"}'] == "1.0"
    assert values['requests_total{status="405"}'] == "1.0"
    assert values["request_seconds_count"] == "2.0"
    assert values["batch_images_sum"] == "2.0"
    assert values["waiting_images"] == "0.0"


def test_fifty_clients_lose_nothing(client, runtime):
    expected = {seed: classes(runtime, picture(seed)) for seed in range(10)}

    def work(seed):
        own = httpx.Client(base_url=client.base_url, timeout=120)
        with own:
            return [own.post("/predict", content=picture(seed)) for _ in range(4)]

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(work, [n % 10 for n in range(50)]))
    for number, responses in enumerate(found):
        for response in responses:
            assert response.status_code == 200, response.text
            (prediction,) = response.json()["predictions"]
            assert top(prediction) == expected[number % 10]


def test_an_overloaded_server_refuses_and_recovers(runtime):
    class Slow(Runtime):
        """Runtime that waits until it may go on."""

        def outputs(self, threshold, pixels):
            begun.append(len(pixels))
            while not go:
                time.sleep(0.001)
            return super().outputs(threshold, pixels)

    begun, go = [], []
    slow = Slow(EXPORT, threads=1)
    limits = Limits(waiting=2, seconds=60)
    with serving(slow, limits=limits) as url, httpx.Client(base_url=url, timeout=120) as client:

        def waiting():
            return client.get("/health").json()["waiting_images"]

        with ThreadPoolExecutor(4) as pool:
            held = [pool.submit(httpx.post, url + "predict", content=picture(), timeout=120)]
            while not begun:
                time.sleep(0.01)
            for count in (1, 2):
                send = pool.submit(httpx.post, url + "predict", content=picture(), timeout=120)
                held.append(send)
                while waiting() < count:
                    time.sleep(0.01)
            refused = client.post("/predict", content=picture())
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "2 images are waiting already" in refused.json()["error"]
            go.append(True)
            assert [each.result(60).status_code for each in held] == [200] * 3
        assert begun == [1, 2]
        assert client.post("/predict", content=picture()).status_code == 200


def test_an_answer_out_of_time_is_504(runtime):
    class Stuck(Runtime):
        """Runtime that takes longer than a request may."""

        def outputs(self, threshold, pixels):
            time.sleep(0.3)
            return super().outputs(threshold, pixels)

    limits = Limits(seconds=0.1)
    with serving(Stuck(EXPORT, threads=1), limits=limits) as url:
        response = httpx.post(url + "predict", content=picture(), timeout=60)
    assert response.status_code == 504
    assert "no answer within 0.1 s" in response.json()["error"]


def test_a_half_sent_body_is_cut_off(runtime):
    with serving(runtime, limits=Limits(seconds=0.2)) as url:
        place = urlsplit(url)
        with socket.create_connection((place.hostname, place.port), timeout=60) as half:
            half.sendall(
                b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 99\r\n\r\nx"
            )
            assert b" 408 " in half.recv(4096).split(b"\r\n")[0]
        assert httpx.get(url + "health", timeout=60).status_code == 200


def test_early_exit_is_counted(runtime):
    anytime = Runtime(EXPORT, threads=1)
    with serving(anytime, threshold=0.0) as url:
        (found,) = httpx.post(url + "predict", content=picture()).json()["predictions"]
    assert found["steps"] == 1
    assert 0 <= found["halting"] <= 1


def test_wrong_settings_are_named(runtime):
    with pytest.raises(UsageError, match="images must be above 0, got 0"):
        Limits(images=0)
    with pytest.raises(UsageError, match="seconds must be above 0, got -1"):
        Limits(seconds=-1)
    with pytest.raises(ServerError, match="port 70000"), serving(runtime, port=70000):
        pass
    elsewhere = serving(runtime, host="192.0.2.1")
    with pytest.raises(ServerError, match="--host must be an address"), elsewhere:
        pass
    with serving(runtime) as url:
        second = serving(runtime, port=urlsplit(url).port)
        with pytest.raises(ServerError, match="is in use"), second:
            pass


def test_a_missing_package_is_named(runtime, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    needed = pytest.raises(ServerError, match=r"pip install 'smallfry-runtime\[serve\]'")
    with needed, serving(runtime):
        pass


def test_answers_are_sent_at_once(runtime):
    with serving(runtime) as url, listening("127.0.0.1", 0) as listener:
        assert httpx.get(url + "health").status_code == 200
        assert listener.proto == socket.IPPROTO_TCP  # for which asyncio sets TCP_NODELAY


# Commands


def test_wrong_use_of_the_command(capsys, tmp_path):
    assert command.main([str(EXPORT), "--batch", "0"]) == 2
    assert "batch must be above 0" in capsys.readouterr().err
    assert command.main([str(tmp_path)]) == 1
    assert "smallfry-serve: " in capsys.readouterr().err
    assert command.main([str(EXPORT), "--exit_steps", "0.5"]) == 2


def test_an_interruption_while_the_export_is_loaded_ends_quietly(capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "Runtime", interrupted)
    assert command.main([str(EXPORT)]) == 130
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words",
    [["smallfry_runtime.serving"], ["smallfry", "serve"]],
    ids=["device", "toolkit"],
)
def test_a_signal_stops_the_server_without_torch(words):
    module, *verb = words
    code = (
        f"import runpy, sys, atexit; sys.argv = {['x', *verb]!r} + sys.argv[1:]; "
        "atexit.register(lambda: print('torch' in sys.modules)); "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(EXPORT), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        url = re.search(r"http://\S+/", line)[0]
        assert line.startswith("serving: http://127.0.0.1:")
        place = urlsplit(url)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        connection.request("POST", "/predict", picture())
        assert json.loads(connection.getresponse().read())["predictions"]
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.split() == ["stopped", "False"]
    finally:
        process.kill()
