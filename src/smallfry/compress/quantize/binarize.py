"""Training to binary weights and activations by a periodic function (BiPer).

The first part of the steps trains real weights sin(ωw), the second their signs; see
``smallfry.layers.biper``. The finished model stores one bit a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.compress.select import dense_layers, read_by_others
from smallfry.errors import UsageError
from smallfry.layers.biper import BinaryConv2d, BinaryLinear, BinaryWeight, binary_layer
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.replace import Replace, replace_layers, tied_layers
from smallfry.transforms.spec import Transform

BINARY = (BinaryConv2d, BinaryLinear)


@register_method
@dataclass(frozen=True)
class BiPer:
    """Training to binary weights and activations.

    Layers with a bias stay in floating point, and by default the first and the last layer.

    Args:
        frequency: ω of sin(ωw).
        second_stage: Part of the steps after which weights are signs.
        regulariser: τ of τ Σ mean sin²(ωw) in the loss. Positive values, as the authors publish it
            (0.037), pull weights to 0, negative ones to ±1.
        ends: Make the first and the last layer binary, too.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep in floating point.

    Example:
        >>> from smallfry import compress
        >>> compress.BiPer(frequency=20.0, second_stage=0.6).regulariser
        0.0
    """

    name: ClassVar[str] = "biper"
    trains: ClassVar[bool] = True

    frequency: float = 20.0
    second_stage: float = 0.67
    regulariser: float = 0.0
    ends: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.frequency > 0:
            raise UsageError(f"biper.frequency must be positive, not {self.frequency}")
        if not 0 <= self.second_stage <= 1:
            raise UsageError(f"biper.second_stage must be 0 to 1, not {self.second_stage}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _BiPer(self)


class _BiPer(Method):
    def __init__(self, settings: BiPer) -> None:
        self._settings = settings
        self._names: tuple[str, ...] = ()
        self._layers: list[BinaryConv2d | BinaryLinear] = []
        self._switch, self._stage = 0, 1

    def begin(self, model: nn.Module, setting: Setting) -> None:
        chosen = _binarisable(model, self._settings)
        ties = tied_layers(model)
        self._names = tuple(dict.fromkeys(tied for name in chosen for tied in ties[name]))
        generator = torch.Generator().manual_seed(setting.seed)
        frequency = self._settings.frequency
        replace_layers(model, self._names, lambda old, _: binary_layer(old, frequency, generator))
        self._layers = [module for module in model.modules() if isinstance(module, BINARY)]
        self._switch = round(self._settings.second_stage * setting.steps)
        self._set_stage(2 if self._switch == 0 and setting.steps else 1)

    def penalty(self, model: nn.Module) -> Tensor | None:
        tau, frequency = self._settings.regulariser, self._settings.frequency
        if tau == 0:
            return None
        terms = [(frequency * layer.weight).sin().square().mean() for layer in self._layers]
        return tau * torch.stack(terms).sum()

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step + 1 >= self._switch:
            self._set_stage(2)

    def finish(self, model: nn.Module) -> Transform:
        replace_layers(model, self._names, lambda old, _: BinaryWeight.from_dense(old))
        return Replace(BinaryWeight.name, {name: {} for name in self._names})

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._set_stage(int(state["stage"]))

    def _set_stage(self, stage: int) -> None:
        self._stage = stage
        for layer in self._layers:
            layer.stage = stage


def _binarisable(model: nn.Module, settings: BiPer) -> list[str]:
    """List the layers to make binary."""
    ends = dense_layers(model)
    kept = () if settings.ends else (ends[0], ends[-1])
    modules, others = dict(model.named_modules()), read_by_others(model)
    chosen = [
        name
        for name in dense_layers(model, settings.include, settings.exclude)
        if name not in kept and name not in others and modules[name].bias is None
    ]
    if not chosen:
        raise UsageError(
            "biper finds no layer to make binary: they have a bias or an embedding's weight, or "
            "are the first and the last one (ends: true)"
        )
    return chosen
