"""RigL: sparsity from the first step, with regrowth at large gradients.

Every Δ steps until a share of the run, f = (α/2)(1 + cos(πt/T)) of each layer's active weights, the
smallest, become zero, and as many others with the largest gradients become active at zero, with
empty moments. Layers have the densities of ``kernel_densities`` (Evci et al., arXiv 1911.11134).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smallfry.compress.prune.channels import steps_of
from smallfry.compress.sparse.masks import MaskedMethod, largest, require_share
from smallfry.compress.sparse.schedules import kernel_densities, update_fraction
from smallfry.errors import UsageError
from smallfry.training.method import Method, Setting, register_method


@register_method
@dataclass(frozen=True)
class RigL:
    """Dynamic sparse training (RigL).

    Args:
        sparsity: Share of the chosen layers' weights that are zero at every step, in [0, 1).
        alpha: Largest share of active weights that move; 0 keeps the first masks.
        every: Steps between two moves.
        end: When they end, as a share of the run up to 1, or in steps above 1.
        first: First masks: random, for a new model, or the largest magnitudes, for a trained one.
        distribution: Densities of layers: kernel (Erdős–Rényi), or uniform.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep dense.
        ends: Mask the first layer and the classifier too.

    Example:
        >>> from smallfry import compress
        >>> compress.RigL(sparsity=0.9, every=50).alpha
        0.3
    """

    name: ClassVar[str] = "rigl"
    trains: ClassVar[bool] = True

    sparsity: float = 0.9
    alpha: float = 0.3
    every: int = 100
    end: float = 0.75
    first: Literal["random", "magnitude"] = "random"
    distribution: Literal["kernel", "uniform"] = "kernel"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ends: bool = False

    def __post_init__(self) -> None:
        require_share(self.name, sparsity=self.sparsity)
        if not 0 <= self.alpha <= 1 or self.every < 1 or self.end < 0:
            raise UsageError("rigl.alpha is 0 to 1, every at least 1, and end at least 0")
        if self.first not in ("random", "magnitude"):
            raise UsageError(f"rigl.first must be random or magnitude, not {self.first!r}")
        if self.distribution not in ("kernel", "uniform"):
            raise UsageError(f"rigl.distribution is kernel or uniform, not {self.distribution!r}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Rigl(self)


class _Rigl(MaskedMethod):
    def __init__(self, settings: RigL) -> None:
        super().__init__(settings)
        self._settings, self._moves = settings, 0

    @torch.no_grad()
    def begin(self, model: nn.Module, setting: Setting) -> None:
        super().begin(model, setting)
        wanted = self._settings
        self._last = min(setting.steps, steps_of(wanted.end, setting.steps))
        density = 1 - wanted.sparsity
        densities = [density] * len(self.weights)
        if wanted.distribution == "kernel":
            densities = kernel_densities([w.shape for w in self.weights.values()], density)
        random = torch.Generator().manual_seed(setting.seed)
        for (name, weight), share in zip(self.weights.items(), densities, strict=True):
            scores = weight.detach().abs()
            if wanted.first == "random":
                scores = torch.rand(weight.shape, generator=random).to(weight.device)
            (self.masks[name],) = largest([scores], max(1, round(share * weight.numel())))
        self.project()

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        due = min(step, self._last) // self._settings.every
        if due > self._moves and step <= self._last:
            self._moves = due
            fraction = update_fraction(self._settings.alpha, step, self._last)
            for name in self.weights:
                self._move(optimizer, name, fraction)
        super().before_step(optimizer, step)

    def _move(self, optimizer: torch.optim.Optimizer, name: str, fraction: float) -> None:
        weight, mask = self.weights[name], self.masks[name]
        if weight.grad is None:
            return
        inactive = int((~mask).sum())
        count = min(int(fraction * int(mask.sum())), inactive)
        if not count:
            return
        dropped = _first(weight.detach().abs(), mask, count, largest=False)
        grown = _first(weight.grad.abs(), ~mask, count, largest=True)
        self.masks[name] = (mask & ~dropped) | grown
        weight.masked_fill_(dropped | grown, 0)
        self.forget(optimizer, name, dropped | grown)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "moves": self._moves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._moves = state["moves"]


def _first(scores: Tensor, among: Tensor, count: int, largest: bool) -> Tensor:
    """Mark so many of the entries of a mask, by their scores."""
    worst = -torch.inf if largest else torch.inf
    flat = scores.masked_fill(~among, worst).flatten()
    chosen = torch.zeros_like(among).flatten()
    chosen[flat.sort(descending=largest, stable=True).indices[:count]] = True
    return chosen.view_as(among)
