"""Gradual magnitude pruning: ever more of the smallest weights become zero while a model trains.

The sparsity rises by ``cubic_sparsity`` and each time the smallest magnitudes go, of all layers
together or of each (Zhu, Gupta, arXiv 1710.01878). ``KeepZeros`` trains a sparse model further.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from smallfry.compress.prune.channels import steps_of
from smallfry.compress.sparse.masks import MaskedMethod, largest, require_share
from smallfry.compress.sparse.schedules import cubic_sparsity
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.method import Method, Setting, register_method


@register_method
@dataclass(frozen=True)
class GradualMagnitude:
    """Unstructured pruning by magnitude while training.

    Args:
        sparsity: Share of the chosen layers' weights that are zero at the end, in [0, 1).
        initial: Share at the begin.
        begin: When pruning begins, as a share of the run up to 1, or in steps above 1.
        end: When it ends, likewise.
        every: Steps between two prunings.
        scope: Compare magnitudes over all layers (global), or within each (layer).
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep dense.
        ends: Prune the first layer and the classifier too.

    Example:
        >>> from smallfry import compress
        >>> compress.GradualMagnitude(sparsity=0.9, every=10).scope
        'global'
    """

    name: ClassVar[str] = "gradual_magnitude"
    trains: ClassVar[bool] = True

    sparsity: float = 0.9
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.6
    every: int = 20
    scope: Literal["global", "layer"] = "global"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ends: bool = False

    def __post_init__(self) -> None:
        require_share(self.name, sparsity=self.sparsity, initial=self.initial)
        if self.initial > self.sparsity or self.every < 1 or self.scope not in ("global", "layer"):
            raise UsageError(
                "gradual_magnitude: initial must be at most sparsity, every at least 1, and scope "
                "global or layer"
            )
        if self.begin < 0 or ((self.begin <= 1) == (self.end <= 1) and self.begin >= self.end):
            raise UsageError(f"{self.name}.begin must come before end")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Gradual(self)


class _Gradual(MaskedMethod):
    def __init__(self, settings: GradualMagnitude) -> None:
        super().__init__(settings)
        self._settings, self._done = settings, -1  # prunings
        self._stepped = False

    def begin(self, model: nn.Module, setting: Setting) -> None:
        super().begin(model, setting)
        wanted = self._settings
        self._first, last = (steps_of(value, setting.steps) for value in (wanted.begin, wanted.end))
        if last > setting.steps:
            raise UsageError(
                f"{wanted.name}.end {last} comes after the run's {setting.steps} steps"
            )
        if last < self._first:
            raise UsageError(
                f"{wanted.name}.begin is step {self._first} of this run, after its end, step {last}"
            )
        self._every = min(wanted.every, max(1, last - self._first))  # at least once
        self._count = max(1, (last - self._first) // self._every)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self._stepped = True
        due = min(self._count, (step + 1 - self._first) // self._every)
        if due > self._done and due >= 0:
            self._done = due
            wanted = self._settings
            self._prune(cubic_sparsity(wanted.initial, wanted.sparsity, due / self._count))
        self.project()

    def settle(self, model: nn.Module) -> None:
        """Zero the masked weights, which are fewer than asked for if the run ended early."""
        if self._stepped and self._done < self._count:
            warnings.warn(
                f"the run ended after {max(0, self._done)} of {self._count} prunings of "
                f"{self._settings.name}: fewer weights are zero than asked for",
                SmallfryWarning,
                stacklevel=2,
            )
        super().settle(model)

    def _prune(self, sparsity: float) -> None:
        names = list(self.weights)
        scopes = [names] if self._settings.scope == "global" else [[name] for name in names]
        for scope in scopes:
            sizes = [self.weights[name].detach().abs() for name in scope]
            keep = round((1 - sparsity) * sum(each.numel() for each in sizes))
            self.masks |= dict(zip(scope, largest(sizes, keep), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "done": self._done, "stepped": self._stepped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._done, self._stepped = state["done"], state.get("stepped", True)


@register_method
@dataclass(frozen=True)
class KeepZeros:
    """Training of a sparse model with fixed zeros.

    Args:
        include: Shell patterns of layer names.
        exclude: Patterns of layers whose zeros may change.
        ends: Keep zeros of the first layer and the classifier too.

    Example:
        >>> from smallfry import compress
        >>> compress.KeepZeros().ends
        True
    """

    name: ClassVar[str] = "keep_zeros"
    trains: ClassVar[bool] = True

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ends: bool = True

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Keep(self)


class _Keep(MaskedMethod):
    def begin(self, model: nn.Module, setting: Setting) -> None:
        super().begin(model, setting)
        self.masks = {name: weight.detach() != 0 for name, weight in self.weights.items()}
