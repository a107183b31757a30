"""Use of a trained model on images and data sets in Python."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smallfry.data.own import as_picture, place_of
from smallfry.errors import UsageError
from smallfry.training.evaluation import predict, require_finite, score, task_of
from smallfry.training.evaluation_data import load_like
from smallfry.training.inference import classify, decode_images
from smallfry.training.run import TrainedModel, require_classes
from smallfry_runtime.errors import DataError
from smallfry_runtime.inputs import InputImage, find_images
from smallfry_runtime.predictions import Answer

MOST_CHANNELS = 4  # of a picture


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
    several = images if is_several(images, arrays, trained.channels) else [images]
    for number, image in enumerate(several):
        name = f"image {number}"
        if isinstance(image, str | Path):
            yield from find_images([str(image)], io.BytesIO())
        elif isinstance(image, bytes) or hasattr(image, "read"):
            yield InputImage(name, image if isinstance(image, bytes) else image.read())
        else:
            yield InputImage(name, _encoded(image) if arrays else as_picture(image, name))


def _encoded(array: Any) -> bytes:
    """Encode an array as ``numpy.save`` does."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(array), allow_pickle=False)
    return stream.getvalue()


def is_several(images: Any, arrays: bool, channels: int) -> bool:
    """Return whether images are several: a list, or an array with a dimension of images.

    Three grey pictures have the shape of one in colour; which they are follows from the model.
    """
    if isinstance(images, str | bytes | Path | Image.Image) or hasattr(images, "read"):
        return False
    if isinstance(images, Sequence | Iterator):
        return True
    shape = np.shape(images)
    if arrays or len(shape) != 3:
        return len(shape) == 4 or (len(shape) == 1 and not arrays)  # of names
    first, last = shape[0], shape[-1]
    return last > MOST_CHANNELS and first != 1 and (first != 3 or channels == 1)


def evaluate_on(trained: TrainedModel, data: Any = None, split: str = "test") -> dict[str, Any]:
    """Score a model; see ``TrainedModel.evaluate``."""
    if split not in ("train", "validation", "test"):
        raise UsageError(f"split is train, validation or test, not '{split}'")
    name = None if data is None else place_of(data, trained.classes)
    place = trained.origin or Path()
    loaded, images, found = load_like(trained, place, name, split=split)
    require_classes(trained, loaded.classes, loaded.origin)
    answers = require_finite(predict(trained.model, images, trained.normalize))
    scores = score(answers, task_of(trained.manifest))
    return {"split": found, "images": len(images), **scores}
