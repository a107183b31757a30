"""From files, folders, globs and standard input to class names with probabilities."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data.images import Encoded, decode
from smallfry.data.sources import images_below
from smallfry.errors import DataError
from smallfry.training.evaluation import forward
from smallfry.training.run import TrainedModel

BATCH = 64
STDIN = "<standard input>"


class Found(NamedTuple):
    """An image to classify, or why there is none."""

    name: str
    encoded: Encoded | None
    error: str | None = None


class Answer(NamedTuple):
    """What a model says of an image."""

    name: str
    top: list[tuple[str, float]]  # class names and probabilities, the likeliest first
    halting: float | None = None  # probability of being right, by a recursive model itself
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        top = [{"class": name, "probability": round(share, 6)} for name, share in self.top]
        answer: dict[str, Any] = {"image": self.name, "class": self.top[0][0], "top": top}
        if self.halting is not None:
            answer["halting"] = round(self.halting, 6)
        return answer


def find_images(inputs: Sequence[str], stdin: BinaryIO) -> Iterator[Found]:
    """The images that files, folders (searched through), globs and ``-`` name.

    ``-`` is one image, or else a list of inputs, one per line.
    """
    for given in inputs:
        if given == "-":
            yield from _from_stdin(stdin)
        else:
            yield from _from_path(given)


def classify(
    trained: TrainedModel,
    found: Iterable[Found],
    top_k: int = 3,
    exit_threshold: float | None = None,
) -> Iterator[Answer]:
    """Answers in the order of the images; an image that can't be read gives an ``error``.

    With ``exit_threshold``, images leave the recursion at that halting probability.
    """
    images = iter(found)
    top_k = min(top_k, len(trained.classes))
    while chunk := list(islice(images, BATCH)):
        yield from _classify_batch(trained, chunk, top_k, exit_threshold)


@torch.inference_mode()
def _classify_batch(
    trained: TrainedModel, chunk: list[Found], top_k: int, exit_threshold: float | None
) -> Iterator[Answer]:
    pixels: list[NDArray[np.uint8]] = []
    errors: list[str | None] = []
    for name, encoded, error in chunk:
        try:
            if encoded is None:
                raise DataError(error or name)
            pixels.append(decode(encoded, name, trained.image_size, trained.channels))
            errors.append(None)
        except DataError as problem:
            errors.append(str(problem))
    rows: Iterator[tuple[list[tuple[str, float]], float | None]] = iter(())  # readable images
    if pixels:
        batch = trained.normalize(torch.from_numpy(np.stack(pixels)))
        logits, halt_logits = forward(trained.model, batch, exit_threshold)[:2]
        shares, indices = logits.softmax(dim=1).topk(top_k, dim=1)
        tops = [
            [(trained.classes[i], share) for i, share in zip(*row, strict=True)]
            for row in zip(indices.tolist(), shares.tolist(), strict=True)
        ]
        halting = [None] * len(tops) if halt_logits is None else halt_logits.sigmoid().tolist()
        rows = zip(tops, halting, strict=True)
    for image, error in zip(chunk, errors, strict=True):
        yield (
            Answer(image.name, *next(rows))
            if error is None
            else Answer(image.name, [], error=error)
        )


def _from_path(given: str) -> Iterator[Found]:
    path = Path(given).expanduser()
    if path.is_file():
        yield Found(given, path)
    elif path.is_dir():
        files = images_below(path)
        yield from (Found(str(file), file) for file in files)
        if not files:
            yield Found(given, None, f"{given}: there are no images in this folder")
    else:
        matches = sorted(glob.glob(given, recursive=True)) if glob.has_magic(given) else []
        for match in matches:
            yield from _from_path(match)
        if not matches:
            yield Found(given, None, f"{given}: there is no such file or folder")


def _from_stdin(stdin: BinaryIO) -> Iterator[Found]:
    content = stdin.read()
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:  # no text, so it is meant to be an image
        yield Found(STDIN, content)
        return
    inputs = [line.strip() for line in lines if line.strip()]
    if not inputs:
        yield Found(STDIN, None, f"{STDIN}: empty; expected an image, or one file per line")
    for line in inputs:
        yield from _from_path(line)
