"""Comparison of an export in float32 with its model."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.errors import ExportError
from smallfry.models.contract import tensors
from smallfry.training.evaluation import forward
from smallfry.training.run import TrainedModel, thresholds_of
from smallfry_runtime.arrays import random_inputs
from smallfry_runtime.runtime import Runtime

__all__ = ["require_agreement"]

TOLERANCE = 1e-4  # between PyTorch's and the engine's probabilities


def require_agreement(trained: TrainedModel, runtime: Runtime) -> None:
    """Compare with PyTorch on random images, at batch sizes that were not traced.

    Classes are compared by their probabilities, other outputs relative to the largest of them. A
    recursion may amplify rounding; then the graphs may differ as far as float32 does from float64.

    Raises:
        ExportError: They differ by more.
    """
    below = len(trained.classes) if _holds_symbols(trained) else 256
    pixels = random_inputs(8, trained.frame, trained.channels, below)
    with torch.inference_mode():
        outputs = forward(trained.model, trained.normalize(torch.from_numpy(pixels)))[0]
    if trained.is_classifier:
        several = thresholds_of(trained) is not None
        outputs = outputs.sigmoid() if several else outputs.softmax(dim=1)
    wanted = [each.numpy() for each in tensors(outputs)]
    scale = 1.0
    if not trained.is_classifier:
        scale = max(1.0, *(float(np.abs(each).max()) for each in wanted))
    for count in (1, len(pixels)):
        if trained.is_classifier:
            given = [runtime.predict(pixels[:count]).probabilities]
        else:
            found = runtime.compute(pixels[:count]).logits
            given = [*found.values()] if isinstance(found, dict) else [found]
        pairs = zip(given, wanted, strict=True)
        distance = max(float(np.abs(one - other[:count]).max()) for one, other in pairs) / scale
        if not distance <= TOLERANCE and not distance <= 4 * _rounding(trained, pixels) / scale:
            raise ExportError(
                f"the exported graphs differ from the model by {distance:.1e} in probability, "
                f"where {TOLERANCE:.0e} is allowed: please report this model"
            )


@torch.inference_mode()
def _rounding(trained: TrainedModel, pixels: NDArray[Any]) -> float:
    """Compute the largest change of the logits by float64, which bounds that of probabilities."""
    images = trained.normalize(torch.from_numpy(pixels))
    exact = tensors(forward(deepcopy(trained.model).double(), images.double())[0])
    plain = tensors(forward(trained.model, images)[0])
    return max(float((a - b).abs().max()) for a, b in zip(plain, exact, strict=True))


def _holds_symbols(trained: TrainedModel) -> bool:
    """Return whether pixels are numbers of symbols, which become inputs as they are."""
    sample = trained.manifest["input"]
    return list(sample["mean"]) == [0.0] and list(sample["std"]) == [1 / 255]
