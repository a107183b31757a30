"""N:M sparsity: of every M consecutive inputs of a row, N weights are other than zero.

The forward pass uses the N largest magnitudes; the gradient there is that of all weights (straight
through), which are kept aside, and those not used decay: gradient + λ(1 − m)w (Zhou et al.,
arXiv 2102.04010). GPUs of compute capability 8.0 and above multiply 2:4 faster in half precision
and int8; other devices don't.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.compress.sparse.masks import MaskedMethod
from smallfry.compress.sparse.schedules import n_of_m
from smallfry.errors import UsageError
from smallfry.training.method import Method, Setting, register_method


@register_method
@dataclass(frozen=True)
class NofM:
    """N:M sparse training, from the second step on.

    Args:
        n: Weights of a group that are kept.
        m: Consecutive inputs in a group; those left over at a row's end stay dense.
        decay: Of the weights that are not used (λ).
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep dense.
        ends: Mask the first layer and the classifier too.

    Example:
        >>> from smallfry import compress
        >>> compress.NofM(n=1, m=4).decay
        0.0002
    """

    name: ClassVar[str] = "n_of_m"
    trains: ClassVar[bool] = True

    n: int = 2
    m: int = 4
    decay: float = 2e-4
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ends: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m or self.decay < 0:
            raise UsageError("n_of_m: n is 1 to below m, and decay at least 0")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _NofM(self)


class _NofM(MaskedMethod):
    def __init__(self, settings: NofM) -> None:
        super().__init__(settings)
        self._settings = settings
        self._dense: dict[str, Tensor] = {}

    def begin(self, model: nn.Module, setting: Setting) -> None:
        super().begin(model, setting)
        self._dense = {}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for name, dense in self._dense.items():
            weight, mask = self.weights[name], self.masks[name]
            weight.copy_(dense)
            if weight.grad is not None:
                weight.grad.add_(dense.masked_fill(mask, 0), alpha=self._settings.decay)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for name, weight in self.weights.items():
            self._dense[name] = weight.detach().clone()
            self.masks[name] = n_of_m(weight, self._settings.n, self._settings.m)
        self.project()

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Keep N of M of the final weights, whatever they are an average of."""
        parameters = dict(model.named_parameters())
        for name in self.masks:
            weight = parameters[name]
            weight.masked_fill_(~n_of_m(weight, self._settings.n, self._settings.m), 0)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "dense": dict(self._dense)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._dense = {n: v.to(self.weights[n].device) for n, v in state["dense"].items()}
