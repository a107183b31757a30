"""Packing of a compressed model's file: fewer bytes, the same weights to the bit."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import nn

from smallfry.compress.coding.packing import ENTROPIES, Entropy, Packed, pack
from smallfry.errors import UsageError
from smallfry.training.checkpoint import safetensors_bytes
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.spec import Transform


@register_method
@dataclass(frozen=True)
class Pack:
    """Lossless coding of integer weights in the run's file, after ``round_weights`` or the like.

    Args:
        entropies: Coders to try: ``static`` (a histogram), ``laplace`` (and Gauss, with a scale for
            each channel) and ``circuit``. The smallest of each tensor is taken.

    Example:
        >>> from smallfry import compress
        >>> compress.Pack(entropies=("static", "laplace")).trains
        False
    """

    name: ClassVar[str] = "pack"
    trains: ClassVar[bool] = False

    entropies: tuple[Entropy, ...] = ENTROPIES

    def __post_init__(self) -> None:
        unknown = [each for each in self.entropies if each not in ENTROPIES]
        if unknown or not self.entropies:
            raise UsageError(f"pack.entropies are of {', '.join(ENTROPIES)}, not {unknown}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Pack(self)

    def write(self, weights: bytes) -> bytes:
        """Pack the content of a file of weights."""
        return _packed(weights, self.entropies).data


@lru_cache(maxsize=1)  # the comparison with the parent and the run need the same file
def _packed(weights: bytes, entropies: tuple[Entropy, ...]) -> Packed:
    return pack(weights, entropies=entropies)


class _Pack(Method):
    def __init__(self, settings: Pack) -> None:
        self._settings = settings
        self._rehearsal = False
        self._report: dict[str, Any] | None = None

    def begin(self, model: nn.Module, setting: Setting) -> None:
        self._rehearsal = setting.rehearsal

    def finish(self, model: nn.Module) -> Transform | None:
        kinds = (torch.int8, torch.uint8)
        if not any(parameter.dtype in kinds for parameter in model.parameters()):
            raise UsageError("pack needs a model with integer weights: put round_weights before it")
        if not self._rehearsal:
            rows = _packed(safetensors_bytes(model.state_dict()), self._settings.entropies).rows
            self._report = {
                "method": self._settings.name,
                "tensors": [row._asdict() for row in rows],
                "bytes": {row.name: row.bytes for row in rows},
            }
        return None

    def report(self) -> dict[str, Any] | None:
        return self._report
