"""Rounding of weights by min-max scales: the baseline for finer settings of ``quantize``."""

from dataclasses import dataclass
from typing import ClassVar

from smallfry.compress.quantize.ptq import Quantize
from smallfry.errors import UsageError
from smallfry.layers.quantizers import BITS
from smallfry.training.method import Method, register_method


@register_method
@dataclass(frozen=True)
class RoundWeights:
    """Post-training rounding of a model's weights to few bits: ``Quantize`` without data.

    Args:
        bits: Bits per weight, 2 to 8.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep in floating point.

    Example:
        >>> import timm, smallfry
        >>> from smallfry.compress import RoundWeights, apply_to_model
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> small, spec = apply_to_model(model, [RoundWeights(bits=4)])
        >>> small.head.codes.dtype
        torch.int8
    """

    name: ClassVar[str] = "round_weights"
    trains: ClassVar[bool] = False

    bits: int = 8
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"round_weights.bits must be 2 to 8, not {self.bits}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return Quantize(
            self.bits, weight_range="minmax", include=self.include, exclude=self.exclude
        ).start()
