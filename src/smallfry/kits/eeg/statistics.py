"""Frozen statistics of the batch norm: of all training windows, or of a subject's own.

The mean and biased variance of each feature behind the ReLU over windows and time, in one pass. A
frozen network's answer to a window does not depend on other windows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from smallfry.errors import DataError, UsageError
from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.training.calibration import CalibrationBatches
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.modes import evaluating

__all__ = ["Statistics", "freeze_statistics"]


@torch.inference_mode()
def freeze_statistics(model: InterpretableCNN, batches: Iterable[Tensor]) -> int:
    """Set the statistics of a network to those of windows.

    Args:
        model: The network, changed in place.
        batches: Normalised windows, (windows, 1, electrodes, samples) each.

    Returns:
        The number of windows.

    Raises:
        UsageError: The network normalises by the batch at hand, or there are no windows.
    """
    if model.norm_by == "batch":
        raise UsageError(
            "with norm batch there are no statistics to be frozen: leave the method eeg-statistics "
            "out, or train with norm population"
        )
    count, windows = 0, 0
    total = torch.zeros(2, model.num_features, dtype=torch.float64)
    with evaluating(model):
        for batch in batches:
            values = model.features(batch).temporal.relu().double().cpu()
            total += torch.stack([values.sum((0, 2)), values.square().sum((0, 2))])
            count, windows = count + values[:, 0].numel(), windows + len(values)
    if not windows:
        raise UsageError("there are no windows to take statistics of")
    mean, square = total / count
    norm = model.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_((square - mean**2).clamp(min=0))
    return windows


@register_method
@dataclass(frozen=True)
class Statistics:
    """Freeze the statistics of InterpretableCNN after training.

    Args:
        windows: File of unlabelled windows of a new subject, ``.npy`` (windows, electrodes,
            samples), in the unit of the training windows; "" takes all training windows.
    """

    name: ClassVar[str] = "eeg-statistics"
    trains: ClassVar[bool] = False
    windows: str = ""

    def start(self) -> Method:
        """Create the method."""
        return _Freezing(self)


class _Freezing(Method):
    def __init__(self, settings: Statistics) -> None:
        self.settings = settings
        self._batches: Iterable[Tensor] = ()
        self._windows = 0

    def begin(self, model: Any, setting: Setting) -> None:
        """Take the calibration windows, or those of the settings."""
        if not isinstance(model, InterpretableCNN):
            raise UsageError(
                f"eeg-statistics is of interpretable_cnn, not of {setting.spec.architecture}"
            )
        batches = setting.batches
        if isinstance(batches, CalibrationBatches):
            batches = batches.every()
            if self.settings.windows:
                batches = [batches.prepared(_read(Path(self.settings.windows), model))]
        self._batches = [setting.example] if setting.rehearsal else batches

    def finish(self, model: Any) -> None:
        """Set the statistics."""
        self._windows = freeze_statistics(model, self._batches)

    def report(self) -> dict[str, Any]:
        """Return the number of windows and their source."""
        source = self.settings.windows or "training"
        return {"method": self.settings.name, "windows": self._windows, "of": source}


def _read(file: Path, model: InterpretableCNN) -> Tensor:
    try:
        found = np.load(file.expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{file}: not a readable .npy file ({error})") from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"{file}: holds several arrays, and one of windows in .npy is expected")
    if found.shape[1:] != model.img_size or found.dtype.kind not in "fiu":
        raise DataError(
            f"{file}: has the shape {found.shape}, expected windows of {model.img_size[0]} "
            f"electrodes and {model.img_size[1]} samples"
        )
    windows = torch.from_numpy(found.astype(np.float32))[:, None]
    if not bool(windows.isfinite().all()):
        raise DataError(f"{file}: a value is not a number: cut the window out, or repair it")
    return windows
