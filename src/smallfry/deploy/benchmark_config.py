"""Settings of a benchmark of deployed models."""

import math
from dataclasses import dataclass
from typing import Literal

from smallfry.errors import UsageError, nearest
from smallfry.training.config import MOST_WORKERS

FORMS = ("eager", "compiled", "float32", "int8", "int8_dynamic", "exit")  # of a run


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of a benchmark of deployed models.

    Args:
        batch_sizes: Batch sizes.
        threads: CPU threads of each model.
        seconds: Minimum measured seconds of each model at each batch size.
        forms: Forms of a run: eager and compiled (PyTorch), float32, int8 and int8_dynamic (ONNX
            Runtime), exit (early exit).
        targets: Device formats of a run besides ONNX, in float32 and int8; default all that are
            installed.
        peers: Also benchmark untrained ViT, ResNet-18 and CCT on the same images.
        checkpoint: Weights of a run's best epoch or last step.
    """

    batch_sizes: tuple[int, ...] = (1, 16, 64)
    threads: int = 1
    seconds: float = 2.0
    forms: tuple[str, ...] = FORMS
    targets: tuple[str, ...] | None = None
    peers: bool = False
    checkpoint: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UsageError(f"batch sizes must be at least 1, got {list(self.batch_sizes)}")
        if self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}")
        if self.threads > MOST_WORKERS:
            raise UsageError(f"threads must be at most {MOST_WORKERS}, got {self.threads}")
        if not 0 < self.seconds < math.inf:
            raise UsageError(f"seconds must be more than 0 and finite, got {self.seconds}")
        for form in self.forms:
            if form not in FORMS:
                raise UsageError(f"unknown form '{form}'{nearest(form, FORMS)}")
