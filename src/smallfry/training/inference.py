"""From images to class names with probabilities."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.errors import DataError
from smallfry.images import decode
from smallfry.inputs import Found
from smallfry.training.evaluation import forward
from smallfry.training.run import TrainedModel

BATCH = 64


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
