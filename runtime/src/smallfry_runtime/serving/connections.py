"""HTTP connections with a deadline for every request, and a limit on their number."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for a request's line and headers to arrive in
REQUEST_SECONDS = 120.0  # from there until the client has read the whole answer
MOST_CONNECTIONS = 128


class BoundedConnection(H11Protocol):
    """Connection of uvicorn with time limits for its request and its reader.

    uvicorn by itself waits for ever for a first request, for the rest of a begun one and for a
    client to read an answer. A connection too many cuts off the oldest of those whose client is to
    send or read something, so that clients who don't can't keep others out.
    """

    head_seconds = HEAD_SECONDS
    request_seconds = REQUEST_SECONDS
    most_connections = MOST_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for a request."""
        super().connection_made(transport)
        self._since = self.loop.time()  # the last answer, or the beginning
        self._arriving = True  # a request's head
        self._deadline = self.loop.call_later(self.head_seconds, self.cut_off)
        if len(self.connections) > self.most_connections:
            others = [other for other in self.connections if isinstance(other, BoundedConnection)]
            late = [other for other in others if other._waits_for_client()]
            min(late, key=lambda other: other._since).cut_off()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive bytes; the first ones of a request start the deadline of its head."""
        if self._is_between_requests() and not self._arriving:
            self._arriving = True
            self._allow(self.head_seconds)
        super().data_received(data)

    def handle_events(self) -> None:
        """Handle received events; a complete head starts the deadline of its request."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._arriving = False
            self._allow(self.request_seconds)

    def on_response_complete(self) -> None:
        """Wait for the next request, and for the client to read the response."""
        self._since = self.loop.time()
        self._allow(self.request_seconds)
        super().on_response_complete()

    def shutdown(self) -> None:
        """Finish the response in progress on shutdown, without waiting for requests."""
        if self._is_between_requests() or not self.cycle.more_body:
            super().shutdown()
        else:
            self.cut_off()

    def cut_off(self) -> None:
        """Close the connection at once, dropping unsent data."""
        self.connections.discard(self)
        self.transport.abort()

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _waits_for_client(self) -> bool:
        return self._is_between_requests() or self.cycle.more_body or self.flow.write_paused

    def _allow(self, seconds: float) -> None:
        self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self.cut_off)
