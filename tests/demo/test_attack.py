"""The demo attacked by raw HTTP: it opens nothing, stays up, and takes no more memory."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from demo_runs import TINY
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the demo's extra is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="its record is of Linux"),
]

from smallfry.cli import main  # noqa: E402
from smallfry.demo.application import OWN_PAGES, build_application  # noqa: E402
from smallfry.demo.page import page_files  # noqa: E402
from smallfry.demo.routes import MOST_BYTES  # noqa: E402
from smallfry.training.run import load_run  # noqa: E402
from smallfry_runtime.serving.guard import MOST_HELD  # noqa: E402

PATIENCE = 600  # seconds after which a test takes something to hang
OCTETS = {"Content-Type": "application/octet-stream"}
AS_JSON = {"Content-Type": "application/json"}
REFUSED = {403, 404, 405, 413, 415, 421}
SOURCES = [str(Path(__file__).parents[2] / folder) for folder in ("src", "runtime/src")]
PYTHONS = (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), *SOURCES)
FUNCTIONS = range(8)  # numbers of functions; the page has fewer


class Demo:
    """A demo in a process of its own, with a record of the files it touches."""

    def __init__(self, process, port, record):
        self.process, self.port, self.record = process, port, record

    def raw(self, request):
        """The status and the body of the answer to the bytes of a request."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            with contextlib.suppress(ConnectionError):  # refused before it was sent
                connection.sendall(request)
            received = b""
            with contextlib.suppress(ConnectionError):
                while chunk := connection.recv(2**16):
                    received += chunk
        head, _, body = received.partition(b"\r\n\r\n")
        return int(head.split()[1]) if head else None, body

    def ask(self, method, path, body=b"", headers=None):
        given = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"} | (headers or {})
        if body or method == "POST":
            given.setdefault("Content-Length", str(len(body)))
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in given.items())]
        return self.raw("\r\n".join([*lines, "", ""]).encode() + body)

    def memory(self, kind="VmRSS"):
        """Resident memory in MiB; its peak is ``VmHWM``."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) / 1024

    def touched(self):
        """What it did to files since the last call, other than to read Python's own."""
        events = [json.loads(line) for line in self.record]
        return [(name, *a) for name, a in events if not (a and a[0].startswith(PYTHONS))]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """Files of the server, good images among them, that no client may learn of."""
    folder = tmp_path_factory.mktemp("secrets")
    Image.new("L", (8, 8), 200).save(folder / "secret.png")
    (folder / "secret.txt").write_text("secret")
    os.mkfifo(folder / "pipe")
    (folder / "socket").symlink_to("/dev/zero")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits, which has examples."""
    run = tmp_path_factory.mktemp("attacked") / "run"
    options = ", ".join(f"{name}: {value}" for name, value in (TINY | {"patch_size": 2}).items())
    fast = ["--epochs=1", "--data.limit=100", "--references=false", "--progress=quiet"]
    assert main(["train", f"--model.options={{{options}}}", *fast, "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def demo(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    program = [sys.executable, str(Path(__file__).with_name("audited_server.py"))]
    process = subprocess.Popen(
        [*program, str(folder / "record"), str(run), "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=(folder / "errors").open("w"),
        text=True,
        env=os.environ | {"TMPDIR": str(folder), "MALLOC_ARENA_MAX": "2"},
    )
    try:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
        with (folder / "record").open() as record:
            demo = Demo(process, port, record)
            works(demo)  # which imports what it needs
            touched = demo.touched()
            for event in ("open", "os.stat", "os.mkdir"):  # so that it is seen to record
                assert event in [name for name, *_ in touched]
            assert any(paths[0].startswith(str(run)) for _, *paths in touched if paths)
            yield demo
        works(demo)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert (folder / "errors").read_text() == ""
        left = {file.name for file in folder.iterdir()}
        assert [name for name in left if name.startswith(("gradio", "smallfry", ".ses"))] == []
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def untouched(demo, secrets):
    """The demo, which after the test works and has touched nothing."""
    yield demo
    works(demo)
    assert demo.touched() == []
    assert len(list(secrets.iterdir())) == 4


def encoded(size=8):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def works(demo):
    """The page, an image and every example are answered."""
    status, body = demo.ask("GET", "/")
    assert status == 200
    assert b"smallfry" in body
    status, body = demo.ask("POST", "/look?name=good.png", encoded(), OCTETS)
    assert status == 200
    assert b"good.png" in body
    for number in range(8):
        status, body = demo.ask("POST", f"/examples/{number}", b"", OCTETS)
        assert status == 200
        assert b'role=\\"status\\"' in body


def hostile_paths(secrets, run):
    """Paths of files that are there, of devices and pipes, and of the demo's own."""
    own = [secrets / "secret.png", secrets / "secret.txt", secrets / "pipe", secrets / "socket"]
    run_files = [run / "config.yaml", run / "best" / "manifest.json"]
    system = ["/dev/zero", "/dev/stdin", "/dev/fd/0", "/proc/self/environ", "/proc/self/mem"]
    return [str(path) for path in [*own, *run_files, *system, "/etc/passwd", "/", "."]]


def spellings(path):
    """The ways to write a path into a URL, that decoders and joiners take differently."""
    up = "../" * 12 + path.lstrip("/")
    return [
        path,
        path.lstrip("/"),
        up,
        up.replace("../", "..%2f"),
        up.replace("../", "%2e%2e/"),
        up.replace("../", "..%252f"),
        up.replace("/", "\\"),
        f"file://{path}",
        f"http://127.0.0.1{path}",
        f"{path}%00.png",
    ]


def file_data(path):
    """A file of a client's, as Gradio has them in its requests."""
    meta = {"_type": "gradio.FileData"}
    return {"path": path, "url": f"/gradio_api/file={path}", "orig_name": "a.png", "meta": meta}


def joined(path, function):
    """The body of Gradio's call of a function with a file."""
    data = [file_data(path), [file_data(path)], {"image": file_data(path)}]
    body = {"data": data, "fn_index": function, "session_hash": "s", "trigger_id": 1}
    return json.dumps(body | {"event_id": "e", "api_name": "predict"}).encode()


def gradio_routes(run):
    """Method and path of every route of Gradio's, for this and every later version of it."""
    guard = build_application([("run", load_run(run))], [], None)

    def walk(routes, before=""):
        for route in routes:
            path = before + getattr(route, "path", "")
            router = getattr(route, "original_router", route)  # of one that is included
            if below := getattr(router, "routes", None):
                yield from walk(below, path)
            else:
                yield from ((m, path) for m in sorted(getattr(route, "methods", None) or {"GET"}))

    return sorted(set(walk(guard.app.routes)))


@pytest.mark.slow
def test_a_function_can_be_called_neither_by_its_number_nor_by_name(untouched, secrets, run):
    for path, function in itertools.product(hostile_paths(secrets, run), FUNCTIONS):
        body = joined(path, function)
        assert untouched.ask("POST", "/gradio_api/queue/join", body, AS_JSON)[0] in REFUSED
    body = joined(str(secrets / "secret.png"), 0)
    for name in ("predict", "js_fn", "js_fn_1", "look", "_look", "0"):
        for route in ("run", "api", "call", "call/v2", "component_server"):
            path = f"/gradio_api/{route}/{name}"
            assert untouched.ask("POST", path, body, AS_JSON)[0] in REFUSED
            assert untouched.ask("POST", path, body, OCTETS)[0] in REFUSED


def test_every_route_of_gradio_but_the_page_is_closed(untouched, secrets, run):
    routes = gradio_routes(run)
    assert len(routes) > 60
    path = str(secrets / "secret.png")
    query = f"?deep_link=../../secrets&session_hash=s&upload_id=u&path={path}"
    for method, template in routes:
        concrete = re.sub(r"\{[^}]*\}", path.lstrip("/"), template)
        if method in ("GET", "HEAD") and concrete in OWN_PAGES:
            continue
        if method == "POST" and template.startswith(("/look", "/examples/")):
            continue
        body = joined(path, 0) if method == "POST" else b""
        for target in (concrete, concrete + query):
            status, answer = untouched.ask(method, target, body, AS_JSON)
            assert status in REFUSED, (method, target)
            assert b"secret" not in answer


def test_files_can_be_got_by_no_spelling_of_their_path(untouched, secrets, run):
    names = ("file=", "file/", "proxy=", "stream/", "custom_component/")
    routes = [f"/gradio_api/{name}" for name in names]
    routes += ["/", "/file=", "/assets/", "/static/", "/svelte/", "/static/img/", "/examples/"]
    paths = hostile_paths(secrets, run)[:7]
    for route, path in itertools.product(routes, paths):
        for spelling in spellings(path):
            assert untouched.ask("GET", route + spelling)[0] in {*REFUSED, 400}


def test_only_the_files_of_the_page_are_served(untouched):
    files = sorted(page_files())
    for path in files[:: len(files) // 20]:
        assert untouched.ask("GET", path)[0] == 200
        for wrong in (f"{path}/", f"/{path}", path.replace("/", "/./", 1), path + "%00"):
            assert untouched.ask("GET", wrong)[0] in REFUSED
    for path in ("/static", "/static/", "/assets", "/assets/", "/static/fonts", "/templates"):
        assert untouched.ask("GET", path)[0] in REFUSED


def test_queries_and_headers_can_not_lead_the_page_elsewhere(untouched, secrets):
    lies = {
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-For": "10.9.8.7",
        "Forwarded": "host=evil.example",
        "Referer": "http://evil.example/",
        "X-Gradio-User": "evil.example",
        "Cookie": "access-token=evil.example",
        "Range": "bytes=" + ",".join(f"{i}-" for i in range(500)),
    }
    plain = untouched.ask("GET", "/")
    for query in ("", f"?deep_link={secrets}", "?deep_link=../../../etc", "?page=../x&__theme=x"):
        assert untouched.ask("GET", f"/{query}", headers=lies) == plain


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x.png", "a%00b", "%ff%fe", "%0d%0aX-A: b"])
def test_a_name_of_an_image_is_text(untouched, name):
    status, body = untouched.ask("POST", f"/look?name={name}", encoded(), OCTETS)
    assert status in (200, 400)  # a line break in a request's line is no HTTP
    assert b"root:" not in body


def test_examples_can_be_looked_at_and_nothing_else(untouched):
    for number in ("8", "-1", "99999999999999999999", "0/", "00", "0x1", "..", "%30", "1e0", "١"):
        status, _ = untouched.ask("POST", f"/examples/{number}", b"", OCTETS)
        assert status == 200 if number == "%30" else status in {*REFUSED, 400}
    for method in ("GET", "DELETE", "PUT", "PATCH", "OPTIONS"):
        assert untouched.ask(method, "/examples/0", b"", OCTETS)[0] in REFUSED
    assert untouched.ask("POST", "/examples/0", b"x", OCTETS)[0] == 413


def test_other_sites_and_names_are_refused(untouched):
    own = f"127.0.0.1:{untouched.port}"
    origins = ["http://evil.example", "null", "http://127.0.0.1:1", f"http://{own}.evil.example"]
    foreign = [{"Origin": origin} for origin in origins]
    foreign += [{"Sec-Fetch-Site": site} for site in ("cross-site", "same-site", "evil")]
    foreign += [{"Host": host} for host in ("evil.example", f"{own}@evil.example", "[::2]", "")]
    for headers in foreign:
        for method, path in (("POST", "/look"), ("POST", "/examples/0"), ("GET", "/theme.css")):
            status, answer = untouched.ask(method, path, b"", OCTETS | headers)
            assert status in REFUSED, (headers, path)
            assert b"access-control" not in answer.lower()
    for kind in ("multipart/form-data; boundary=b", "text/plain", "application/json", ""):
        assert untouched.ask("POST", "/look", encoded(), {"Content-Type": kind})[0] == 415
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert untouched.ask("OPTIONS", "/look", b"", asked)[0] in REFUSED


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"POST /look HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\nContent-Type: application/octet-stream\r\n\r\n0\r\n\r\n"
        b"GET /gradio_api/info HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
        b"POST /look HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"CONNECT evil.example:80 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /gradio_api/queue/data HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
        b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n\r\n",
    ],
)
def test_what_is_no_proper_request_is_refused(untouched, request_bytes):
    with socket.create_connection(("127.0.0.1", untouched.port), timeout=PATIENCE) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_bytes)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(2**16):
                answer += chunk
    assert b" 200 " not in answer.split(b"\r\n")[0] or b"smallfry" not in answer
    assert b"named_endpoints" not in answer


def test_half_sent_requests_keep_nobody_out(untouched):
    head = f"POST /look HTTP/1.1\r\nHost: 127.0.0.1:{untouched.port}\r\n".encode()
    octets = b"Content-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n"
    page = head.replace(b"POST /look", b"GET /") + b"\r\n"  # an answer that nobody reads
    for begun in (b"", head, head + octets + b"x", page):
        late = []
        for _ in range(150):
            late.append(socket.create_connection(("127.0.0.1", untouched.port), timeout=PATIENCE))
            late[-1].sendall(begun)
        deadline = time.monotonic() + PATIENCE  # a busy machine may cut some off
        while untouched.ask("GET", "/")[0] != 200:
            assert time.monotonic() < deadline
        works(untouched)
        for one in late:
            one.close()


def test_400_mb_of_uploads_stay_within_the_bound_of_memory(untouched):
    upload = os.urandom(MOST_BYTES)
    untouched.ask("POST", "/look", upload, OCTETS)
    before = untouched.memory()
    with ThreadPoolExecutor(4) as crowd:
        asked = [crowd.submit(untouched.ask, "POST", "/look", upload, OCTETS) for _ in range(20)]
        statuses = [one.result()[0] for one in asked]
    assert set(statuses) <= {200, 503, None}
    assert 200 in statuses
    works(untouched)
    # The allocator keeps some of what was freed, which depends on how the uploads met.
    assert untouched.memory("VmHWM") - before < 4 * MOST_HELD / 2**20
    too_long = OCTETS | {"Content-Length": str(MOST_BYTES + 1)}
    assert untouched.ask("POST", "/look", b"x" * 100, too_long)[0] == 413
    chunked = b"%x\r\n%s\r\n" % (len(upload), upload) + b"100\r\n" + b"x" * 256 + b"\r\n0\r\n\r\n"
    headers = OCTETS | {"Transfer-Encoding": "chunked", "Content-Length": "0"}
    status, _ = untouched.ask("POST", "/look", chunked, headers)
    assert status in (400, 413, None)


@pytest.mark.slow
def test_images_that_decode_to_much_are_refused_or_forgotten(untouched):
    large, huge = BytesIO(), BytesIO()
    Image.new("L", (9_000, 9_000)).save(large, "png")
    Image.new("1", (20_000, 20_000)).save(huge, "png")

    def attack():
        for _ in range(3):
            assert untouched.ask("POST", "/look", large.getvalue(), OCTETS)[0] == 200
        status, body = untouched.ask("POST", "/look", huge.getvalue(), OCTETS)
        assert (status, json.loads(body)["panels"]) == (200, [])
        return untouched.memory()

    # an allocator or an idle thread may keep an image of 77 MiB; a leak grows by three each round
    rounds = [attack() for _ in range(4)]
    assert min(later - earlier for earlier, later in itertools.pairwise(rounds)) < 16  # MiB
