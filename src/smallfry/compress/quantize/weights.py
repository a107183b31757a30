"""Post-training rounding of weights to 2 to 8 bits: the baseline for finer methods.

Symmetric, with a scale for each output channel; see ``smallfry.layers.quantized``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from smallfry.compress.select import dense_layers
from smallfry.errors import UsageError
from smallfry.layers.quantized import BITS, QuantizedWeight
from smallfry.training.method import Method, register_method
from smallfry.transforms.replace import Replace, replace_layers, tied_layers
from smallfry.transforms.spec import Transform


@register_method
@dataclass(frozen=True)
class RoundWeights:
    """Post-training rounding of a model's weights to few bits.

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
        return _Round(self)


class _Round(Method):
    def __init__(self, settings: RoundWeights) -> None:
        self._settings = settings

    def finish(self, model: nn.Module) -> Transform:
        ties = tied_layers(model)
        found = dense_layers(model, self._settings.include, self._settings.exclude)
        names = dict.fromkeys(tied for one in found for tied in ties[one])
        setting = {"bits": self._settings.bits}
        replace_layers(model, names, lambda old, _: QuantizedWeight.from_dense(old, **setting))
        return Replace(QuantizedWeight.name, {name: dict(setting) for name in names})
