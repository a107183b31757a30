"""HESSO: channels shrunk to zero while a model trains, with any optimizer.

At the start of each of P periods of L steps, the channels with the lowest saliency are chosen
(``saliency``); over the period their weights are multiplied by (L − τ − 1)/(L − τ), τ = 1, 2, ...,
after each step of the optimizer, and reach exactly zero at its end. The model is cut at the end of
the training (Chen et al., arXiv 2409.09085; schedule after only_train_once, MIT).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.compress.prune.channels import (
    ChannelMethod,
    Of,
    require_prunable,
    require_scores,
    steps_of,
)
from smallfry.compress.prune.saliency import (
    TAYLOR,
    clear_moments,
    directions,
    saliencies,
    scale_channels,
)
from smallfry.compress.prune.selection import Chosen, lowest, reference_choice
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.groups import ChannelGroup
from smallfry.transforms.spec import Transform


@register_method
@dataclass(frozen=True)
class HESSO:
    """Structured pruning while training (HESSO), over any optimizer.

    Args:
        sparsity: Share to remove, in [0, 1).
        of: Unit of the share: channels of all groups; macs, multiply-accumulates of all calls for
            one image; or ms, by a table of latencies. The result doesn't exceed the last two, and
            the channels that go are the least salient for what they save.
        table: File of measured latencies, of ms.
        begin: When pruning begins, as a share of the run up to 1, or in steps above 1.
        end: When the last channel is zero, likewise; the rest of the run recovers.
        periods: Times at which channels are chosen; fewer in a shorter run.
        divisible: Survivors of a group are a multiple, or all; heads go one by one.
        weights: Weights of the scores magnitude, mean magnitude, cosine, Taylor and its square; the
            authors have 0.2 of each, which was less accurate (docs/pruning.md).
        cosine_sign: 1 as in the authors' code; −1 prefers channels that steps move towards zero.
        reference_selection: Choose by the authors' rule, which rounds in each period and removes
            fewer channels than asked for.
        include: Shell patterns of group names, which are layer names.
        exclude: Patterns of groups to keep unchanged.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry import compress
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> hesso = compress.HESSO(sparsity=0.5, begin=0, end=1, periods=2)
        >>> session = compress.Session(model, [hesso], images[:2], steps=6)
        >>> session.attach(optimizer)
        >>> for _ in range(6):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(images), labels).backward()
        ...     _ = optimizer.step()
        >>> _ = session.finish()
        >>> sum(p.numel() for p in model.parameters()) < 0.8 * 109_131
        True
    """

    name: ClassVar[str] = "hesso"
    trains: ClassVar[bool] = True

    sparsity: float = 0.5
    of: Of = "channels"
    table: str | None = None
    begin: float = 0.1
    end: float = 0.6
    periods: int = 10
    divisible: int = 8
    weights: tuple[float, ...] = TAYLOR
    cosine_sign: int = 1
    reference_selection: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_prunable(self)
        require_scores(self.name, self.weights, self.cosine_sign)
        if self.begin < 0 or self.end <= 0 or self.periods < 1:
            raise UsageError("hesso.begin is at least 0, end above 0, and periods at least 1")
        if (self.begin <= 1) == (self.end <= 1) and self.begin >= self.end:
            raise UsageError(f"hesso.begin must come before end, not {self.begin} and {self.end}")
        if self.reference_selection and self.of != "channels":
            raise UsageError("hesso.reference_selection goes with of channels")

    def start(self) -> Method:
        """Create the method with these settings."""
        return RunningHESSO(self)


class RunningHESSO(ChannelMethod):
    """State of HESSO.

    Attributes:
        active: Channels that shrink, of each group.
        scores: Weighted scores at the last choice, (5, channels) of each group.
    """

    def __init__(self, settings: HESSO) -> None:
        super().__init__(settings)
        self._settings = settings
        self._before: dict[str, Tensor] | None = None

    def use(self, model: nn.Module, groups: Sequence[ChannelGroup], setting: Setting) -> None:
        """Start on given groups; see ``ChannelMethod.use``."""
        super().use(model, groups, setting)
        wanted, steps = self._settings, setting.steps
        self._first, last = (steps_of(value, steps) for value in (wanted.begin, wanted.end))
        if last > steps or last <= self._first:
            raise UsageError(
                f"hesso needs steps between begin and end: {self._first} and {last} of {steps} "
                "steps of the run"
            )
        self._periods = min(wanted.periods, last - self._first)
        self._length = (last - self._first) // self._periods
        self._period, self._position = -1, -1
        self._total: int | None = None
        self.active: Chosen = [[] for _ in groups]
        self._ever: Chosen = [[] for _ in groups]
        self.scores: list[Tensor] = []

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Copy the weights of channels where a period begins."""
        period, _ = self._place(step + 1)
        if period > self._period:
            self._before = {name: self.tensors[name].detach().clone() for name in self.moved}

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Choose channels where a period begins, and shrink those chosen."""
        self._stepped = True
        period, position = self._place(step + 1)
        if period < 0:
            return
        if self._before is not None:
            self._commit(optimizer)
            self._choose(optimizer, period)
            self._before = None
        now, before = self._length - 2 - position, self._length - 2 - self._position
        factor = now / before if now > 0 else 0.0
        for group, active, gone in zip(self.groups, self.active, self.gone, strict=True):
            scale_channels(group, self.tensors, active, factor)
            scale_channels(group, self.tensors, gone, 0.0)
        self._position = position
        if factor == 0:
            self._commit(optimizer)

    def _place(self, t: int) -> tuple[int, int]:
        """Return the period of step t, counted from 1, and the position in it; −1 before all.

        Where a run leaves steps out, the last period may begin late: then it ends at once.
        """
        elapsed = t - self._first - 1
        if elapsed < 0:
            return -1, -1
        period, position = divmod(elapsed, self._length)
        return (
            (period, position) if period < self._periods else (self._periods - 1, self._length - 1)
        )

    def _choose(self, optimizer: torch.optim.Optimizer, period: int) -> None:
        assert self._before is not None
        moved = directions(optimizer, self._before, self.tensors)
        wanted = self._settings
        totals, self.scores = saliencies(
            self.scored, self._before, moved, wanted.weights, wanted.cosine_sign
        )
        totals = self.priced(totals)
        self._period, self._position = period, -1
        if self._settings.reference_selection:
            self.active = self._reference(totals, period)
        else:
            self.active = self._lowest(totals, period)
        self._ever = [a + b for a, b in zip(self._ever, self.active, strict=True)]

    def _lowest(self, totals: list[Tensor], period: int) -> Chosen:
        plan, left = self.choose_rest(totals), self._periods - period
        return lowest(totals, plan, ceil(sum(map(len, plan)) / left))

    def _reference(self, totals: list[Tensor], period: int) -> Chosen:
        if self._total is None:
            self._total = self.target(totals)
        share = self._total // self._periods
        number = share if period < self._periods - 1 else self._total - share * period
        if sum(map(len, self.gone)) >= self._total:
            return [[] for _ in self.groups]
        chosen = reference_choice(totals, self._ever, self.gone, number, self._settings.divisible)
        self._total += sum(map(len, chosen)) - number
        return chosen

    def _commit(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove active channels for good."""
        for group, active, gone in zip(self.groups, self.active, self.gone, strict=True):
            scale_channels(group, self.tensors, active, 0.0)
            clear_moments(optimizer, group, self.tensors, active)
            gone += active
            gone.sort()
        self.active = [[] for _ in self.groups]

    def finish(self, model: nn.Module) -> Transform | None:
        """Cut the channels that are gone."""
        if self._stepped and (self._period < self._periods - 1 or any(self.active)):
            warnings.warn(
                f"the run ended in period {self._period + 1} of {self._periods} of hesso: fewer "
                "channels are removed than asked for",
                SmallfryWarning,
                stacklevel=2,
            )
        return super().finish(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the channels and the position in the schedule."""
        return {
            **super().state_dict(),
            "active": [list(each) for each in self.active],
            "ever": [list(each) for each in self._ever],
            "schedule": [self._period, self._position, self._total],
            "stepped": self._stepped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        super().load_state_dict(state)
        self.active = [list(each) for each in state["active"]]
        self._ever = [list(each) for each in state["ever"]]
        self._period, self._position, self._total = state["schedule"]
        self._stepped = state["stepped"]
