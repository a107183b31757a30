"""Comparison of an export in float32 with its model."""

from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.errors import ExportError
from smallfry.training.evaluation import forward
from smallfry.training.run import TrainedModel, thresholds_of
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
    values = len(trained.classes) if _holds_symbols(trained) else 256
    shape = (8, *trained.input_shape)
    pixels = np.random.default_rng(0).integers(0, values, shape, np.uint8)
    with torch.inference_mode():
        logits = forward(trained.model, trained.normalize(torch.from_numpy(pixels)))[0]
    wanted = (logits.softmax(dim=1) if thresholds_of(trained) is None else logits.sigmoid()).numpy()
    if not trained.is_classifier:
        wanted = logits.numpy()
    scale = 1.0 if trained.is_classifier else max(1.0, float(np.abs(wanted).max()))
    for count in (1, len(pixels)):
        if trained.is_classifier:
            given = runtime.predict(pixels[:count]).probabilities
        else:
            given = runtime.compute(pixels[:count]).logits
        distance = float(np.abs(given - wanted[:count]).max()) / scale
        if not distance <= TOLERANCE and not distance <= 4 * _rounding(trained, pixels) / scale:
            raise ExportError(
                f"the exported graphs differ from the model by {distance:.1e} in probability, "
                f"where {TOLERANCE:.0e} is allowed: please report this model"
            )


@torch.inference_mode()
def _rounding(trained: TrainedModel, pixels: NDArray[np.uint8]) -> float:
    """Compute the largest change of the logits by float64, which bounds that of probabilities."""
    images = trained.normalize(torch.from_numpy(pixels))
    exact = forward(deepcopy(trained.model).double(), images.double())[0]
    return float((forward(trained.model, images)[0] - exact).abs().max())


def _holds_symbols(trained: TrainedModel) -> bool:
    """Return whether pixels are numbers of symbols, which become inputs as they are."""
    sample = trained.manifest["input"]
    return list(sample["mean"]) == [0.0] and list(sample["std"]) == [1 / 255]
