"""Routes that classify an image sent in the request body, never a name or path."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from smallfry.demo.examples import Example
from smallfry.demo.puzzles import panel_of, solves_puzzles
from smallfry.demo.trace import think
from smallfry.demo.view import PICTURE, picture_url, show_error, show_moment, show_status
from smallfry.errors import SmallfryError
from smallfry.training.run import TrainedModel
from smallfry_runtime.images import decode

MOST_BYTES = 20 * 2**20  # of an uploaded image
MOST_WAITING = 8  # images, the one that is answered included
LONGEST_NAME = 200  # characters of a file's name that are shown
PRIVATE = {"cache-control": "no-store"}


class Shown(NamedTuple):
    """Model on the page."""

    origin: str  # where it came from, such as its run folder
    trained: TrainedModel


def answer(models: Sequence[Shown], image: bytes, name: str) -> dict[str, Any]:
    """Answer to an image, or a puzzle, with all models, or return the reason of the failure.

    Args:
        models: The models of the page.
        image: An encoded image, or the text of a puzzle.
        name: Displayed name of the image.

    Returns:
        ``status``, HTML, and ``panels``: for each model the moment of its ``answer``, its
        ``picture`` as a URL of data, and its ``views``, the HTML of every moment; none for what is
        not an image that can be read.
    """
    try:
        panels = [_panel(trained, image, name) for _, trained in models]
    except SmallfryError as error:
        return {"status": show_error(str(error)), "panels": []}
    return {"status": show_status(name), "panels": panels}


def _panel(trained: TrainedModel, image: bytes, name: str) -> dict[str, Any]:
    if solves_puzzles(trained):
        return panel_of(trained, image, name)
    pixels = decode(image, name, trained.frame, trained.channels, trained.bit_depth)
    trace = think(trained, pixels)
    views = [
        show_moment(trace, moment, trained.classes, PICTURE) for moment in range(len(trace.moments))
    ]
    return {"answer": trace.answer, "picture": picture_url(trace), "views": views}


class Answering:
    """Routes of the demo; one image is processed at a time, with a short queue.

    Args:
        models: Models of the page.
        examples: Images that can be asked for by their number.
    """

    def __init__(self, models: Sequence[Shown], examples: Sequence[Example]) -> None:
        self._models = models
        self._examples = examples
        self._waiting = 0
        self._turn = CapacityLimiter(1)

    def routes(self) -> list[BaseRoute]:
        """Return ``POST /look`` with an image as its body, and ``POST /examples/N`` without one."""
        return [
            Route("/look", self._look, methods=["POST"]),
            Route("/examples/{number:int}", self._look_at_example, methods=["POST"]),
        ]

    async def _look(self, request: Request) -> Response:
        name = request.query_params.get("name", "the image")[:LONGEST_NAME]
        return await self._answer(request, name)

    async def _look_at_example(self, request: Request) -> Response:
        number = int(request.path_params["number"])
        if number >= len(self._examples):
            return PlainTextResponse("there is no such example", 404)
        example = self._examples[number]
        return await self._answer(request, example.name, example.text or example.png)

    async def _answer(self, request: Request, name: str, image: bytes = b"") -> Response:
        image = image or await request.body()
        if self._waiting == MOST_WAITING:
            return PlainTextResponse("too many images wait for an answer; try it again", 503)
        self._waiting += 1
        try:
            async with self._turn:
                if await request.is_disconnected():  # nobody waits for this one any more
                    return Response(status_code=204)
                answered = await to_thread.run_sync(answer, self._models, image, name)
        finally:
            self._waiting -= 1
        return JSONResponse(answered, headers=PRIVATE)
