"""The guard by itself: only listed requests of the page's own site pass, whole and in bounds."""

import asyncio

import pytest

from smallfry_runtime.serving.guard import Guard

JSON_TYPE = "application/json"


class Recorder:
    """An application that reads a request and answers with what it is given."""

    def __init__(self, answer=b""):
        self.requests = []
        self.answer = answer

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.requests.append((scope, message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.answer})


def guarded(app=None, hosts=None, **options):
    return Guard(app or Recorder(), {"/", "/theme.css"}, {"/look": 100}, hosts, **options)


async def request(guard, method, path, chunks=(b"",), headers=(), ends=True, send=None):
    """The messages of the answer to a request, and how many chunks were read for it."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"a=b",
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }
    waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    waiting[-1]["more_body"] = not ends
    sent = []

    async def receive():
        if not waiting:
            await asyncio.sleep(60)
        return waiting.pop(0)

    async def keep(message):
        sent.append(message)

    await guard(scope, receive, send or keep)
    return sent, len(chunks) - len(waiting)


def ask(guard, method="GET", path="/", chunks=(b"",), ends=True, **headers):
    """The status and the headers of the answer to a request, and how many chunks were read."""
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    sent, read = asyncio.run(request(guard, method, path, chunks, pairs, ends))
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert guard.held == 0
    return sent[0]["status"], dict(sent[0]["headers"]), read


def upload(guard, *chunks, ends=True, **headers):
    headers = {"content_type": "application/octet-stream"} | headers
    return ask(guard, "POST", "/look", chunks, ends, **headers)


def test_the_application_sees_a_whole_body_and_few_headers():
    app = Recorder()
    status, headers, read = upload(
        guarded(app), b"x" * 60, b"y" * 40, host="h", x_forwarded_host="evil", range="bytes=0-"
    )
    assert (status, read) == (200, 2)
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'")
    [(scope, body)] = app.requests
    assert body == b"x" * 60 + b"y" * 40
    assert scope["headers"] == [(b"host", b"h")]
    assert scope["query_string"] == b"a=b"
    assert ask(guarded(app))[0] == 200
    assert app.requests[1][0]["query_string"] == b""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/theme.css", 200),
        ("GET", "/theme.css/", 404),
        ("GET", "//theme.css", 404),
        ("GET", "/../theme.css", 404),
        ("GET", "/gradio_api/file=/etc/passwd", 404),
        ("GET", "http://evil.example/", 404),
        ("GET", "", 404),
        ("GET", "/look", 405),
        ("PUT", "/look", 405),
        ("OPTIONS", "/look", 405),
        ("POST", "/", 405),
        ("DELETE", "/theme.css", 405),
        ("HEAD", "/", 200),
        ("HEAD", "/look", 405),
        ("HEAD", "/theme.css/", 404),
        ("POST", "/gradio_api/queue/join", 404),
    ],
)
def test_only_listed_requests_pass(method, path, status):
    app = Recorder()
    assert ask(guarded(app), method, path)[0] == status
    assert len(app.requests) == (status == 200)


@pytest.mark.parametrize(
    ("path", "method", "allowed"), [("/", "PUT", b"GET, HEAD"), ("/look", "GET", b"POST")]
)
def test_a_refused_method_comes_with_those_that_are_allowed(path, method, allowed):
    status, headers, _ = ask(guarded(), method, path)
    assert (status, headers[b"allow"]) == (405, allowed)


def test_a_head_request_passes_without_its_query():
    app = Recorder()
    assert ask(guarded(app), "HEAD", "/")[0] == 200
    [(scope, _)] = app.requests
    assert (scope["method"], scope["query_string"]) == ("HEAD", b"")


def test_refusals_are_text_for_people_or_json_for_programs_and_are_observed():
    for as_json, kind, body in (
        (False, b"text/plain", b"no such page"),
        (True, b"application/json", b'{"error": "no such page"}'),
    ):
        seen = []
        guard = guarded(as_json=as_json, observe=seen.append)
        sent, _ = asyncio.run(request(guard, "GET", "/none"))
        assert dict(sent[0]["headers"])[b"content-type"] == kind
        assert sent[1]["body"] == body
        assert ask(guard)[0] == 200
        assert seen == [404]


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", JSON_TYPE, "multipart/form-data; boundary=x", "application/octet-stream; x"],
)
def test_a_body_has_a_type_that_other_sites_have_to_ask_for(kind):
    assert upload(guarded(), b"x", content_type=kind)[0] == 415


def test_a_body_that_says_or_turns_out_to_be_too_long_is_refused():
    guard = guarded()
    assert upload(guard, b"", content_length="101")[::2] == (413, 0)
    assert upload(guard, b"", content_length="-1")[::2] == (413, 0)
    assert upload(guard, b"", content_length="1, 2")[::2] == (413, 0)
    assert upload(guard, *[b"x" * 60] * 10)[::2] == (413, 2)
    assert ask(guard, "GET", "/", [b"x"], content_length="1")[::2] == (413, 0)
    assert ask(guard, "GET", "/", [b"x"])[0] == 413


def test_a_body_that_stops_half_way_is_refused():
    status, _, read = upload(guarded(seconds=0.05), b"x", ends=False)
    assert (status, read) == (408, 1)


def test_all_bodies_together_have_a_bound():
    guard = guarded(most_held=150, seconds=60)
    octets = [("content-type", "application/octet-stream")]

    async def crowd():
        half = asyncio.create_task(request(guard, "POST", "/look", [b"x" * 90], octets, ends=False))
        await asyncio.sleep(0)
        while guard.held != 90:
            await asyncio.sleep(0.001)
        refused, _ = await request(guard, "POST", "/look", [b"x" * 61], octets)
        passed, _ = await request(guard, "POST", "/look", [b"x" * 60], octets)
        half.cancel()
        await asyncio.gather(half, return_exceptions=True)
        return refused[0]["status"], passed[0]["status"]

    assert asyncio.run(crowd()) == (503, 200)
    assert guard.held == 0


def test_an_answer_is_sent_as_fast_as_it_is_read_and_counts_until_then():
    guard, sent, held = guarded(Recorder(b"x" * 200_000)), [], []

    async def send(message):
        held.append(guard.held)
        sent.append(message)

    asyncio.run(request(guard, "GET", "/", send=send))
    lengths = [len(message["body"]) for message in sent[1:]]
    assert sum(lengths) == 200_000
    assert max(lengths) <= 2**16
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(lengths) - 1) + [False]
    assert held[1] == 200_000
    assert guard.held == 0


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:7860", 200),
        ("127.0.0.1", 200),
        ("[::1]:7860", 200),
        ("rebound.example:7860", 421),
        ("localhost.example", 421),
        ("127.0.0.1@rebound.example", 421),
        ("", 421),
        ("[", 421),
        ("localhost, rebound.example", 421),
    ],
)
def test_it_answers_to_its_own_names_only(host, status):
    assert ask(guarded(hosts={"localhost", "127.0.0.1", "::1"}), host=host)[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "https://127.0.0.1:7860"}, 200),  # behind a proxy
        ({"origin": "http://127.0.0.1:8888"}, 403),
        ({"origin": "http://localhost:7860"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:7860.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "cross-site", "origin": "http://127.0.0.1:7860"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}, 403),
    ],
)
def test_other_sites_can_neither_upload_nor_read(headers, status):
    headers["host"] = "127.0.0.1:7860"
    assert upload(guarded(), b"x", **headers)[0] == status
    assert ask(guarded(), "GET", "/theme.css", **headers)[0] == status


def test_a_link_of_another_site_leads_to_the_page_but_no_frame_does():
    link = {"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}
    assert ask(guarded(), **link)[0] == 200
    status, headers, _ = ask(guarded(), **link | {"sec_fetch_dest": "iframe"})
    assert status == 403
    assert b"frame-ancestors 'none'" in headers[b"content-security-policy"]
