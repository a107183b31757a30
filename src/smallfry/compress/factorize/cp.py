"""CP convolutions, of a trained model or from the start of training (``smallfry.layers.cp``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from smallfry.compress.factorize.method import FactorSettings, candidates
from smallfry.errors import UsageError
from smallfry.io.json import Plain
from smallfry.layers.cp import CP as Layer
from smallfry.layers.cp import rank_for
from smallfry.layers.linear_map import is_whole
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.replace import Replace, replace_layers
from smallfry.transforms.spec import Transform

FIFTH = 0.2


@register_method
@dataclass(frozen=True)
class CP(FactorSettings):
    """CP decomposition of a trained model's convolutions.

    Example:
        >>> import torch
        >>> from smallfry.compress import CP, apply_to_model
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1))
        >>> small, spec = apply_to_model(model, [CP(keep=0.4)])
        >>> dict(spec.transforms[0].settings)
        {'0': {'rank': 24}}
    """

    name: ClassVar[str] = "cp"
    layer: ClassVar[Any] = Layer

    keep: float = FIFTH

    def choose(self, layer: nn.Module, keep: float) -> dict[str, Plain] | None:
        """Choose the rank of a convolution; linear layers and those of 1 × 1 stay dense."""
        return _choose(layer, keep)


@register_method
@dataclass(frozen=True)
class APrioriCP:
    """CP convolutions from the start of training.

    The network is trained in the factors, which start at random.

    Args:
        keep: Parameters of the factors as a share of the convolution's, below 1.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep dense.
        smallest: Convolutions with fewer parameters stay dense.

    Example:
        >>> import torch
        >>> from smallfry.compress import APrioriCP, Session
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1))
        >>> session = Session(model, [APrioriCP()], torch.zeros(1, 16, 8, 8), steps=10)
        >>> sum(p.numel() for p in model.parameters())
        472
    """

    name: ClassVar[str] = "a_priori_cp"
    trains: ClassVar[bool] = True

    keep: float = FIFTH
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    smallest: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UsageError(f"a_priori_cp.keep must be between 0 and 1, not {self.keep}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _APriori(self)


class _APriori(Method):
    def __init__(self, settings: APrioriCP) -> None:
        self._settings = settings
        self._chosen: dict[str, Mapping[str, Plain]] = {}

    def begin(self, model: nn.Module, setting: Setting) -> None:
        settings = self._settings
        layers = candidates(model, settings, lambda each: _choose(each, settings.keep))
        self._chosen = {n: _choose(each, settings.keep) or {} for n, each in layers.items()}
        if not self._chosen:
            raise UsageError(
                "a_priori_cp finds no convolution to replace: they are 1 × 1, in groups, or have "
                f"fewer than {settings.smallest} parameters (smallest)"
            )
        generator = torch.Generator().manual_seed(setting.seed)

        def make(layer: nn.Module, name: str) -> nn.Module:
            made = Layer.like(layer, **self._chosen[name])
            made.reset_parameters(generator)
            return made

        replace_layers(model, self._chosen, make)

    def finish(self, model: nn.Module) -> Transform:
        return Replace(Layer.name, self._chosen)


def _choose(layer: nn.Module, keep: float) -> dict[str, Plain] | None:
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size == (1, 1) or not is_whole(layer):
        return None
    return {"rank": rank_for(layer, keep)}
