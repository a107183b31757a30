"""Inference with a trained model in PyTorch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.models.contract import map_tensors, tensors
from smallfry.training.evaluation import forward, task_of
from smallfry.training.run import TrainedModel, require_class_answers, thresholds_of
from smallfry_runtime.inputs import InnerSize, InputImage
from smallfry_runtime.pairs import with_sizes
from smallfry_runtime.predictions import Answer, Decoded, Outputs, answers, decoded


def decode_images(
    trained: TrainedModel,
    images: Iterable[InputImage],
    exit_threshold: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Decoded]:
    """Decode a model's answers to images in order, by its task.

    Args:
        trained: The model.
        images: The images; one that can't be read gives an ``error``, as does one whose answer is
            not a number.
        exit_threshold: Halting probability at which an image leaves the recursion.
        settings: Of the task's decoder.
    """
    task = task_of(trained.manifest)

    @torch.inference_mode()
    def run(pixels: NDArray[np.uint8], sizes: Sequence[InnerSize]) -> list[Any]:
        batch = trained.normalize(torch.from_numpy(pixels))
        outputs = map_tensors(Tensor.float, forward(trained.model, batch, exit_threshold)[0])
        rows = [each.isfinite().reshape(len(each), -1).all(dim=1) for each in tensors(outputs)]
        numbers = map_tensors(partial(torch.nan_to_num, nan=0.0, posinf=0.0, neginf=0.0), outputs)
        chosen = with_sizes(task.name, settings, sizes, trained.frame)
        values = task.decode(numbers, trained.classes, chosen)
        known = torch.stack(rows).all(dim=0).tolist()
        return [value if number else None for value, number in zip(values, known, strict=True)]

    return decoded(run, images, trained.frame, trained.channels, trained.bit_depth)


def classify(
    trained: TrainedModel,
    images: Iterable[InputImage],
    top_k: int = 3,
    exit_threshold: float | None = None,
) -> Iterator[Answer]:
    """Classify images in order; an image that can't be read gives an ``error``.

    With ``exit_threshold``, images leave the recursion at that halting probability.

    Raises:
        UsageError: The model is no classifier.
    """
    require_class_answers(trained)
    thresholds = thresholds_of(trained)

    @torch.inference_mode()
    def run(pixels: NDArray[np.uint8]) -> Outputs:
        batch = trained.normalize(torch.from_numpy(pixels))
        logits, halt_logits, steps = forward(trained.model, batch, exit_threshold)
        return Outputs(
            (logits.softmax(dim=1) if thresholds is None else logits.sigmoid()).numpy(),
            None if halt_logits is None else halt_logits.sigmoid().numpy(),
            None if steps is None else steps.numpy(),
        )

    frame, channels = trained.frame, trained.channels
    wanted = (trained.classes, frame, channels, top_k, trained.bit_depth, thresholds)
    return answers(run, images, *wanted)
