"""HTTP server for an export: images, arrays or texts in, JSON out, without PyTorch."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

from numpy.typing import NDArray

from smallfry_runtime.decoders import decoder_of, has_decoder
from smallfry_runtime.errors import DataError, ExportError, ServerError, SmallfryError, UsageError
from smallfry_runtime.graphs import Computed
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.manifest import Manifest
from smallfry_runtime.names import text_of
from smallfry_runtime.pairs import pair_up, takes_pairs
from smallfry_runtime.predictions import NOT_FINITE, Answer, Decoded
from smallfry_runtime.runtime import Runtime
from smallfry_runtime.serving.batching import Batcher, Busy, Late
from smallfry_runtime.serving.limits import Limits
from smallfry_runtime.serving.listening import (
    STOP_SECONDS,
    address,
    is_loopback,
    known_hosts,
    listening,
    running,
    until_stopped,
)
from smallfry_runtime.terminal import say

HELP = (
    "POST {} to /predict, as the body or as a form with one or more files: "
    "curl -F {}=@{} ADDRESS/predict. The query may have settings, in JSON, such as ?top_k=5. "
    "GET /health and /metrics (Prometheus)."
)
KINDS = {  # of inputs
    "image": ("an image", "cat.jpg"),
    "array": ("an array, as numpy.save writes it,", "input.npy"),
    "pair": (
        "two pictures, the left view before the right one, or an array, as numpy.save writes it,",
        "left.png -F pair=@right.png",
    ),
    "text": ("a text", "puzzles.txt"),
}


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
        limits = limits or Limits()
        service = Service(runtime, threshold, limits)
        seconds = max(STOP_SECONDS, limits.seconds + 1)  # so that each has its answer
        try:
            with running(service.application(known_hosts(host)), listener, seconds):
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
        UsageError: This version can't decode the export's answers.
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
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of broken forms
        self.kind, self.input = input_of(runtime)
        self.runtime, self.threshold, self.limits = runtime, threshold, limits
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
            as_json=True,
            observe=lambda status: self.requests.labels(status).inc(),
        )

    async def _describe(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        manifest = self.runtime.manifest
        named, file = KINDS[self.kind]
        page = {
            "help": HELP.format(named, self.kind, file),
            "task": manifest.task,
            "classes": list(self.runtime.classes),
            self.kind: self.input,
            "settings": settings_of(manifest),
            "limits": vars(self.limits),
        }
        return JSONResponse(page)

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
            inputs = await self._inputs(request)
            settings = _settings(request.query_params.multi_items())
            found = await run_in_threadpool(self.predict, inputs, settings, begin)
            status = 200
            return JSONResponse({"predictions": [answer.to_dict() for answer in found]})
        except SmallfryError as error:
            status = next((code for kind, code in STATUS if isinstance(error, kind)), 500)
            headers = {"retry-after": "1"} if status == 503 else None
            return JSONResponse({"error": text_of(str(error))}, status, headers)
        finally:
            self.requests.labels(status).inc()
            self.seconds.observe(time.monotonic() - begin)

    def predict(
        self,
        inputs: Iterable[InputImage],
        settings: Mapping[str, Any] | None = None,
        begin: float | None = None,
    ) -> list[Answer | Decoded]:
        """Answer the inputs of a request.

        Args:
            inputs: Images, files of NumPy, pairs of views one after the other, or texts.
            settings: As of ``Runtime.answer_each``.
            begin: When the request had arrived, by ``time.monotonic``; default now.

        Raises:
            Busy: Too many images wait already.
            DataError: An input that can't be read, or a text of too many puzzles.
            ExportError: An answer is not a number.
            Late: There was no answer in time.
            UsageError: A setting that is not there.
        """
        begin = time.monotonic() if begin is None else begin
        run = partial(self._computed, begin + self.limits.seconds)
        if self.kind == "pair":
            inputs = pair_up(inputs, self.runtime.manifest.frame)
        found = []
        for answer in self.runtime.answer_each(inputs, settings, self.threshold, run):
            if answer.error is not None:
                failed = ExportError if NOT_FINITE in answer.error else DataError
                raise failed(answer.error)
            found.append(answer)
        return found

    def _computed(self, deadline: float, pixels: NDArray[Any]) -> Computed:
        """Compute inputs in batches with those of other requests, in the time that is left."""
        if self.kind == "text" and len(pixels) > self.limits.images:
            raise DataError(f"{len(pixels)} puzzles, expected at most {self.limits.images}")
        left = deadline - time.monotonic()  # after the inputs were decoded
        if left <= 0:
            raise Late(f"no answer within {self.limits.seconds:g} s")
        try:
            return self.batcher(pixels, left)
        except Late:
            raise Late(f"no answer within {self.limits.seconds:g} s") from None

    async def _inputs(self, request: Any) -> list[InputImage]:
        """Read the inputs of a request, from a form or from its body."""
        from python_multipart.exceptions import FormParserError
        from starlette.exceptions import HTTPException

        most = self.limits.images
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            if not (body := await request.body()):
                raise DataError(f"no {self.kind}: send one as the body, or as a form with files")
            return [InputImage(self.kind, body)]
        try:
            async with request.form(max_files=most, max_fields=most) as form:
                parts = [part for _, part in form.multi_items()]
                files = [part for part in parts if not isinstance(part, str)]
                if len(files) < len(parts) or not files:
                    raise DataError("the form must have files, and nothing else")
                return [InputImage(f.filename or self.kind, await f.read()) for f in files]
        except (HTTPException, FormParserError) as error:
            reason = getattr(error, "detail", error)
            raise DataError(f"the form can't be read: {reason}") from error


STATUS = ((Busy, 503), (Late, 504), (DataError, 400), (UsageError, 400))


def input_of(runtime: Runtime) -> tuple[str, dict[str, Any]]:
    """Describe the inputs of an export: ``image``, ``array``, ``pair`` or ``text``, and sizes.

    Raises:
        UsageError: This version can't decode the export's answers.
    """
    manifest, frame = runtime.manifest, runtime.manifest.frame
    kind = "image"
    about: dict[str, Any] = {
        "size": manifest.image_size,
        "channels": manifest.channels,
        "resize": manifest.resize,
    }
    if frame.is_array(manifest.channels):
        kind, about = "array", {"shape": list(manifest.input_shape), "values": frame.values}
    if manifest.is_classifier:
        return kind, about
    if not has_decoder(manifest.task):
        named = f"{kind}s ({', '.join(f'{name} {value}' for name, value in about.items())})"
        raise UsageError(
            f"this version has no decoder for the task '{manifest.task[:40]}', so its export can't "
            f"be served: it takes {named}, and Runtime.compute has its outputs for them; smallfry "
            "predict RUN answers with the run itself"
        )
    if takes_pairs(manifest.task):
        return "pair", about
    if runtime.takes_texts:
        return "text", {"rows": frame.height, "columns": frame.width}
    return kind, about


def settings_of(manifest: Manifest) -> list[str]:
    """List the settings that a request may have, by the task."""
    if manifest.is_classifier:
        return ["top_k"]
    kind = getattr(decoder_of(manifest.task), "Settings", None)
    return [each.name for each in fields(kind)] if kind else []


def _settings(query: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Read the settings of a query: values of JSON, or else texts."""
    found: dict[str, Any] = {}
    for name, text in query:
        if name in found:
            raise UsageError(f"the setting '{name}' is given twice")
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found
