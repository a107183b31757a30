"""HTTP server for an export: images in, JSON out, without PyTorch."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from smallfry_runtime.errors import DataError, ServerError, SmallfryError, UsageError
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.predictions import Answer, answers
from smallfry_runtime.runtime import Runtime
from smallfry_runtime.serving.batching import Batcher, Busy, Late
from smallfry_runtime.serving.limits import Limits
from smallfry_runtime.serving.listening import (
    address,
    is_loopback,
    known_hosts,
    listening,
    running,
    until_stopped,
)
from smallfry_runtime.terminal import say

HELP = (
    "POST an image to /predict, as the body or as a form with one or more files: "
    "curl -F image=@cat.jpg ADDRESS/predict; ?top_k=5 gives more classes. "
    "GET /health and /metrics (Prometheus)."
)


def serve(
    runtime: Runtime,
    host: str = "127.0.0.1",
    port: int = 8000,
    threshold: float | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve an export until SIGINT or SIGTERM.

    Args:
        runtime: The export.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        threshold: Halting probability at which an image leaves the recursion.
        limits: Limits on requests.

    Raises:
        ServerError: The port is taken, the host is none of this machine's, or a package is missing.
        UsageError: Early exit from an export that has none.
    """
    with serving(runtime, host, port, threshold, limits) as url, until_stopped() as stop:
        say(f"serving: {url}   (Ctrl-C stops)")
        if not is_loopback(host):
            say("everyone who can reach this machine can use it")
        stop.wait()
    say("stopped")


@contextmanager
def serving(
    runtime: Runtime,
    host: str = "127.0.0.1",
    port: int = 0,
    threshold: float | None = None,
    limits: Limits | None = None,
) -> Iterator[str]:
    """Serve an export, and yield the address; see ``serve``."""
    threshold = runtime.exit_threshold(threshold=threshold)
    with listening(host, port) as listener:
        service = Service(runtime, threshold, limits or Limits())
        try:
            with running(service.application(known_hosts(host)), listener):
                yield address(listener)
        finally:
            service.close()


class Service:
    """Predictions of an export for requests, with metrics.

    Args:
        runtime: The export.
        threshold: Halting probability at which an image leaves the recursion.
        limits: Limits on requests.

    Raises:
        ServerError: A package is missing.
        UsageError: The export's answers are not classes.
    """

    def __init__(self, runtime: Runtime, threshold: float | None, limits: Limits) -> None:
        try:
            import prometheus_client as metrics
            import python_multipart  # noqa: F401  for forms
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise ServerError(
                f"the server needs more packages: pip install 'smallfry-runtime[serve]' ({error})"
            ) from error
        runtime.require_classes()
        self.runtime, self.limits = runtime, limits
        self.registry = metrics.CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "smallfry"}
        self.requests = metrics.Counter("requests", "Requests by status.", ["status"], **own)
        self.seconds = metrics.Histogram("request_seconds", "Seconds of answered requests.", **own)
        sizes = [2**power for power in range(10)]
        self.batches = metrics.Histogram("batch_images", "Images of a batch.", buckets=sizes, **own)
        waiting = metrics.Gauge("waiting_images", "Images that wait for the model.", **own)
        run = partial(runtime.outputs, threshold)
        self.batcher = Batcher(run, limits.batch, limits.waiting, self.batches.observe)
        waiting.set_function(lambda: self.batcher.waiting)

    def close(self) -> None:
        """Finish what is being computed."""
        self.batcher.close()

    def application(self, hosts: set[str] | None = None) -> Any:
        """Build the ASGI application.

        Args:
            hosts: Names that it is asked for by; None for any.
        """
        from starlette.applications import Starlette
        from starlette.routing import Route

        from smallfry_runtime.serving.guard import Guard

        routes = [
            Route("/", self._describe),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/predict", self._predict, methods=["POST"]),
        ]
        most = int(self.limits.megabytes * 1e6)
        return Guard(
            Starlette(routes=routes),
            {"/", "/health", "/metrics"},
            {"/predict": most},
            hosts,
            self.limits.seconds,
            most_held=max(8 * most, 64 * 2**20),
            types=None,
        )

    async def _describe(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        manifest = self.runtime.manifest
        image = {
            "size": manifest.image_size,
            "channels": manifest.channels,
            "resize": manifest.resize,
        }
        classes = list(self.runtime.classes)
        limits = vars(self.limits)
        return JSONResponse({"help": HELP, "classes": classes, "image": image, "limits": limits})

    async def _health(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok", "waiting_images": self.batcher.waiting})

    async def _metrics(self, request: Any) -> Any:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        from starlette.responses import Response

        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def _predict(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse

        begin, status = time.monotonic(), 500
        try:
            images = await self._images(request)
            top_k = _top_k(request.query_params.get("top_k", "3"))
            found = await run_in_threadpool(self.predict, images, top_k)
            status = 200
            return JSONResponse({"predictions": [answer.to_dict() for answer in found]})
        except SmallfryError as error:
            status = next((code for kind, code in STATUS if isinstance(error, kind)), 500)
            headers = {"retry-after": "1"} if status == 503 else None
            return JSONResponse({"error": str(error)}, status, headers)
        finally:
            self.requests.labels(status).inc()
            self.seconds.observe(time.monotonic() - begin)

    def predict(self, images: Sequence[InputImage], top_k: int = 3) -> list[Answer]:
        """Predict the classes of a request's images.

        Raises:
            Busy: Too many images wait already.
            DataError: An image that can't be read.
            ExportError: An answer is not a number.
            Late: There was no answer in time.
        """
        manifest = self.runtime.manifest
        run = partial(self.batcher, seconds=self.limits.seconds)
        size, channels, depth = manifest.frame, manifest.channels, manifest.bit_depth
        wanted = (self.runtime.classes, size, channels, top_k, depth, self.runtime.thresholds)
        found = list(answers(run, images, *wanted))
        for answer in found:
            if answer.error is not None:
                raise DataError(answer.error)
        return found

    async def _images(self, request: Any) -> list[InputImage]:
        """Read the images of a request, from a form or from its body."""
        from python_multipart.exceptions import FormParserError
        from starlette.exceptions import HTTPException

        most = self.limits.images
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            if not (body := await request.body()):
                raise DataError("no image: send one as the body, or as a form with files")
            return [InputImage("image", body, None)]
        try:
            async with request.form(max_files=most, max_fields=most) as form:
                parts = [part for _, part in form.multi_items()]
                files = [part for part in parts if not isinstance(part, str)]
                if len(files) < len(parts) or not files:
                    raise DataError("the form must have files, and nothing else")
                return [InputImage(f.filename or "image", await f.read(), None) for f in files]
        except (HTTPException, FormParserError) as error:
            reason = getattr(error, "detail", error)
            raise DataError(f"the form can't be read: {reason} (at most {most} files)") from error


STATUS = ((Busy, 503), (Late, 504), (DataError, 400), (UsageError, 400))


def _top_k(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0):
        raise UsageError("top_k must be a whole number above 0")
    return int(text)
