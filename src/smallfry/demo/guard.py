"""What stands between the net and the page: bounded requests, and no way out."""

from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Gradio's page makes functions of strings and styles of its own; what matters is 'self': a browser
# refuses to ask any other host for anything.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class Guard:
    """ASGI middleware: refuses large requests, and forbids the page to ask other hosts.

    Args:
        app: What is guarded.
        most_bytes: Of a request's body.
        hosts: Names that the page is asked for by; default any. On loopback this keeps out other
            sites, which may give a name of theirs this machine's address (DNS rebinding).
    """

    def __init__(self, app: App, most_bytes: int, hosts: Collection[str] | None = None) -> None:
        self.app = app
        self.most_bytes = most_bytes
        self.hosts = hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.hosts is not None and _host(headers) not in self.hosts:
            await _refuse(send, 421, "this page is served to its own machine only")
            return
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.most_bytes:
            await _refuse(send, 413, f"at most {self.most_bytes:,} bytes are taken")
            return
        received, refused = 0, False

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received <= self.most_bytes:
                return message
            if not refused:  # a body that did not say how long it is
                refused = True
                await _refuse(send, 413, f"at most {self.most_bytes:,} bytes are taken")
            return {"type": "http.disconnect"}

        async def headed(message: Message) -> None:
            if refused:
                return
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", [])}
                added = [(name, value) for name, value in HEADERS.items() if name not in names]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self.app(scope, counted, headed)


def _host(headers: Mapping[bytes, bytes]) -> str | None:
    try:
        return urlsplit("//" + headers.get(b"host", b"").decode()).hostname
    except ValueError:
        return None


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
