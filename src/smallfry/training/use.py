"""Use of a trained model on images and data sets in Python."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smallfry.data.own import as_picture, is_own, keep_data
from smallfry.errors import UsageError
from smallfry.training.evaluation import predict, require_finite, score, task_of
from smallfry.training.evaluation_data import load_like
from smallfry.training.inference import classify, decode_images
from smallfry.training.run import TrainedModel
from smallfry_runtime.errors import DataError
from smallfry_runtime.inputs import InputImage, find_images
from smallfry_runtime.predictions import Answer


def predict_images(trained: TrainedModel, images: Any, top_k: int = 3) -> list[Answer]:
    """Classify images; see ``TrainedModel.predict``."""
    if top_k < 1:
        raise UsageError(f"top_k must be at least 1, got {top_k}")
    answers = list(classify(trained, _inputs(trained, images), top_k))
    for answer in answers:
        if answer.error is not None:
            raise DataError(answer.error)
    return answers


def decode_answers(
    trained: TrainedModel, images: Any, settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode the answers to images; see ``TrainedModel.decode``."""
    found = list(decode_images(trained, _inputs(trained, images), settings=settings))
    for each in found:
        if each.error is not None:
            raise DataError(each.error)
    return [each.value for each in found]


def _inputs(trained: TrainedModel, images: Any) -> Iterator[InputImage]:
    """Yield the images that are meant, by name."""
    arrays = trained.frame.is_array(trained.channels)
    several = list(images) if _is_several(images, arrays) else [images]
    for number, image in enumerate(several):
        if isinstance(image, str | Path):
            yield from find_images([str(image)], io.BytesIO())
        else:
            name = f"image {number}"
            yield InputImage(name, _encoded(image) if arrays else as_picture(image, name))


def _encoded(array: Any) -> bytes:
    """Encode an array as ``numpy.save`` does."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(array), allow_pickle=False)
    return stream.getvalue()


def _is_several(images: Any, arrays: bool) -> bool:
    """Return whether images are several: a list, or an array with a dimension of images."""
    if isinstance(images, str | Path | Image.Image):
        return False
    if isinstance(images, Sequence):
        return True
    shape = np.shape(images)
    if arrays:
        return len(shape) == 4
    return len(shape) == 4 or (len(shape) == 3 and 3 not in shape and 1 not in shape)


def evaluate_on(trained: TrainedModel, data: Any = None, split: str = "test") -> dict[str, Any]:
    """Score a model; see ``TrainedModel.evaluate``."""
    if split not in ("train", "validation", "test"):
        raise UsageError(f"split is train, validation or test, not '{split}'")
    if is_own(data):
        data = keep_data(data)
    name = None if data is None else str(data)
    place = trained.origin or Path()
    _, images, found = load_like(trained, place, name, split=split)
    answers = require_finite(predict(trained.model, images, trained.normalize))
    scores = score(answers, task_of(trained.manifest))
    return {"split": found, "images": len(images), **scores}
