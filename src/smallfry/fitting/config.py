"""Settings of a fit: the data, the budget of the device, and that of time."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smallfry.errors import UsageError
from smallfry.io.json import strict
from smallfry.training.config import DataConfig

UNCOMPARED = ("data.root",)  # settings that a resumed fit may change
MOST_SEED = 2**63


class Budget(NamedTuple):
    """Limits of the exported file; None for no limit."""

    kb: float | None  # of all its graphs, kB of 1,000 bytes
    ms: float | None  # for one image on one core

    def fits(self, kb: float, ms: float) -> bool:
        """Return whether both limits are met."""
        return self.excess(kb, ms) <= 1

    def excess(self, kb: float, ms: float) -> float:
        """Return the larger of both costs as a multiple of its limit."""
        return max(
            0.0 if self.kb is None else kb / self.kb, 0.0 if self.ms is None else ms / self.ms
        )

    def __str__(self) -> str:
        parts = [] if self.kb is None else [f"{self.kb:g} kB"]
        return " and ".join(parts + ([] if self.ms is None else [f"{self.ms:g} ms"]))


@dataclass(frozen=True)
class FitConfig:
    """Budget and data of a fit.

    Args:
        data: The data set, as for ``smallfry train``.
        max_kb: Largest export in kB (1,000 bytes).
        max_ms: Longest time for one image on one core of this machine, in milliseconds of CPU time.
        min_accuracy: Test accuracy in percent below which the fit has failed.
        minutes: Minutes of idle cores, as many as threads; a busy machine takes longer.
        target: Device format: onnx, openvino, executorch or litert.
        candidates: Models of timm's registry to choose from; default those of the zoo.
        search: Origin of the first candidates: listed takes those of the zoo by their cost, tpe
            proposes models with learning rates and augmentation by Optuna.
        pretrained: Runs or shared folders to start from where classes may differ and image sizes
            agree; default those in results/models, if they are there.
        threads: CPU threads of the training; default all cores.
        device: Device of the training: auto, cpu, cuda or mps.
        seed: Random seed.
    """

    data: DataConfig = field(default_factory=DataConfig)
    max_kb: float | None = None
    max_ms: float | None = None
    min_accuracy: float | None = None
    minutes: float = 60.0
    target: str = "onnx"
    candidates: tuple[str, ...] | None = None
    search: Literal["listed", "tpe"] = "listed"
    pretrained: tuple[Path, ...] | None = None
    threads: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_kb", "max_ms", "minutes"):
            given = getattr(self, name)
            if given is not None and not 0 < given < math.inf:
                raise UsageError(f"{name} must be more than 0 and finite, got {given}")
        if self.min_accuracy is not None and not 1 < self.min_accuracy <= 100:
            raise UsageError(
                "min_accuracy is a percentage above 1 and at most 100, such as 90, got "
                f"{self.min_accuracy:g}"
            )
        if self.data.several_labels:
            raise UsageError(
                "a fit is for images of one class each: for several, take smallfry train --task "
                "multilabel"
            )
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}")
        if not 0 <= self.seed < MOST_SEED:
            raise UsageError(f"seed is 0 to below 2**63, got {self.seed}")
        if self.candidates is not None and not self.candidates:
            raise UsageError("candidates is empty; give at least one, or leave it out")
        if self.data.validation == 0:
            raise UsageError("a fit chooses on validation images: data.validation must be above 0")

    @property
    def budget(self) -> Budget:
        """Limits of the exported file."""
        return Budget(self.max_kb, self.max_ms)

    def require_budget(self) -> None:
        """Require at least one limit.

        Raises:
            UsageError: There is none.
        """
        if self.max_kb is None and self.max_ms is None:
            raise UsageError(
                "a fit needs a budget of the device: give --max_kb, --max_ms or both; without "
                "one, use smallfry train"
            )

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data by dotted name, to compare with another fit."""
        from smallfry.data.named import full_name

        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data = {f"data.{k}": v for k, v in vars(values.pop("data")).items()}
        data["data.name"] = full_name(self.data.name)
        found: dict[str, Any] = strict({**values, **data})
        return {name: value for name, value in found.items() if name not in UNCOMPARED}
