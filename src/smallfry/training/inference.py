"""Inference with a trained model in PyTorch."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.training.evaluation import forward
from smallfry.training.run import TrainedModel, require_class_answers, thresholds_of
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.predictions import Answer, Outputs, answers


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
