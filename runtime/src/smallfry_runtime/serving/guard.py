"""ASGI middleware between network and application: an allow-list of requests with limits."""

import asyncio
import json
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    MutableMapping,
)
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

BODY_SECONDS = 30.0  # for a request's body to arrive in
MOST_HELD = 64 * 2**20  # bytes of all bodies and unread answers together
PIECE_BYTES = 2**16  # of an answer
UPLOAD_TYPES = (b"application/octet-stream",)  # which other sites can't send without being asked

# Headers that applications need to see. Gradio believes those of proxies, and answers ranges.
PASSED = frozenset({b"host", b"accept-encoding", b"if-none-match", b"if-modified-since"})

# Gradio's page makes functions of strings and styles of its own; what matters is 'self': a browser
# refuses to ask any other host for anything.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class _Refused(Exception):
    """Status of a refused request, a text for people, and headers."""


class Guard:
    """ASGI middleware for listed same-site requests alone, complete and within limits.

    Args:
        app: The application behind it.
        pages: Paths of GET and HEAD. Their queries and all headers but a few are left out.
        uploads: Paths that can be posted to, with the most bytes of a body.
        hosts: Names that the page is asked for by; default any. On loopback this keeps out other
            sites, which may give a name of theirs this machine's address (DNS rebinding).
        seconds: For a body to arrive in.
        most_held: Bytes of all bodies and unread answers together; while there are more, no body
            is taken.
        types: Media types that a body may have; None for any, as for programs that send images.
        as_json: Refuse by ``{"error": …}``, for programs, in place of a text for people.
        observe: Called with the status of each refused request.
    """

    def __init__(
        self,
        app: App,
        pages: Collection[str],
        uploads: Mapping[str, int],
        hosts: Collection[str] | None = None,
        seconds: float = BODY_SECONDS,
        most_held: int = MOST_HELD,
        types: Collection[bytes] | None = UPLOAD_TYPES,
        as_json: bool = False,
        observe: Callable[[int], Any] = lambda status: None,
    ) -> None:
        self.app = app
        self.pages = pages
        self.uploads = uploads
        self.hosts = hosts
        self.seconds = seconds
        self.most_held = most_held
        self.types = types
        self.as_json = as_json
        self.observe = observe
        self.held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            self._check(scope)
            async with self._body(scope, receive) as body:
                await self.app(self._passed(scope), _replay(body, receive), self._paced(send))
        except _Refused as refused:
            await self._refuse(send, *refused.args)
        except ConnectionError:  # gone before it was understood
            pass

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = scope["headers"]
        if self.hosts is not None and _host(_value(headers, b"host")) not in self.hosts:
            raise _Refused(421, "this page is only available on its own machine")
        method, path = scope["method"], scope["path"]
        link = method == "GET" and path == "/" and _value(headers, b"sec-fetch-dest") == b"document"
        if not _same_site(headers) and not link:
            raise _Refused(403, "other sites can't use this page")
        if method in ("GET", "HEAD") and path in self.pages:
            return
        if path not in self.uploads:
            if path in self.pages:
                raise _Refused(405, "only GET is allowed here", (b"allow", b"GET, HEAD"))
            raise _Refused(404, "no such page")
        if method != "POST":
            raise _Refused(405, "only POST is allowed here", (b"allow", b"POST"))
        if self.types is not None and _value(headers, b"content-type") not in self.types:
            raise _Refused(415, f"the body must be {b' or '.join(self.types).decode()}")

    @asynccontextmanager
    async def _body(
        self, scope: MutableMapping[str, Any], receive: Receive
    ) -> AsyncIterator[bytes]:
        """Receive the whole body of a request, counted as held until the response."""
        most = self.uploads.get(scope["path"], 0)
        declared = _value(scope["headers"], b"content-length") or b"0"
        if not declared.isdigit() or int(declared) > most:
            raise _Refused(413, f"the limit is {most:,} bytes")
        chunks, length = [], 0
        try:
            async with _deadline(self.seconds):
                async for chunk in _chunks(receive):
                    length += len(chunk)
                    self.held += len(chunk)
                    if length > most:  # of a body that declared no length
                        raise _Refused(413, f"the limit is {most:,} bytes")
                    if self.held > self.most_held:
                        raise _Refused(503, "too many images are being sent; try again")
                    chunks.append(chunk)
            body = b"".join(chunks)
            chunks.clear()
            yield body
        finally:
            self.held -= length

    def _paced(self, send: Send) -> Send:
        """Add headers to a response, and send it in pieces at the client's pace.

        What a client does not read would lie in memory otherwise. It counts as held.
        """

        async def paced(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", [])}
                added = [(name, value) for name, value in HEADERS.items() if name not in names]
                await send({**message, "headers": [*message.get("headers", []), *added]})
                return
            body, more = message.get("body", b""), message.get("more_body", False)
            self.held += len(body)
            try:
                for begin in range(0, len(body), PIECE_BYTES):
                    piece = body[begin : begin + PIECE_BYTES]
                    await send({"type": message["type"], "body": piece, "more_body": True})
            finally:
                self.held -= len(body)
            if not more:
                await send({"type": message["type"], "body": b"", "more_body": False})

        return paced

    def _passed(self, scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Filter the parts of a request that the application receives."""
        passed = PASSED if self.types else PASSED | {b"content-type"}
        headers = [(name, value) for name, value in scope["headers"] if name in passed]
        query = scope["query_string"] if scope["method"] == "POST" else b""
        return {**scope, "headers": headers, "query_string": query}

    async def _refuse(
        self, send: Send, status: int, text: str, *headers: tuple[bytes, bytes]
    ) -> None:
        self.observe(status)
        kind = b"text/plain"
        if self.as_json:
            kind, text = b"application/json", json.dumps({"error": text})
        given = [(b"content-type", kind), (b"connection", b"close"), *headers, *HEADERS.items()]
        await send({"type": "http.response.start", "status": status, "headers": given})
        await send({"type": "http.response.body", "body": text.encode()})


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise _Refused(408, f"the body did not arrive within {seconds:g} s") from None


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _value(headers: Collection[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Join all values of a header as HTTP does."""
    return b", ".join(value for key, value in headers if key == name)


def _host(host: bytes) -> str | None:
    try:
        return urlsplit(f"//{host.decode()}").hostname
    except ValueError:
        return None


def _same_site(headers: Collection[tuple[bytes, bytes]]) -> bool:
    """Return False for a request that a browser sends for another site or port."""
    if _value(headers, b"sec-fetch-site") not in (b"", b"same-origin", b"none"):
        return False
    if not (origin := _value(headers, b"origin")):
        return True
    _, _, host = origin.partition(b"://")
    return host.lower() == _value(headers, b"host").lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Replay the body as one message, followed by later messages."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
