"""CRIC: a search for indispensable channels before HESSO's shrinking.

1. *Projection.* For each group, a quarter, half and three quarters of its least salient channels
   are set to zero for a step, and the loss there is noted relative to the first one.
2. *Sampling.* In cycles of S steps, channels that look redundant but were not tried yet are shrunk
   while the others train; all cycles start from the same weights. No channel to try ends it.
3. The final saliency is the mean over all of these steps, plus the group's mean relative loss
   divided by its channels. The lowest channels shrink over H steps of ordinary training.

Chen et al., arXiv 2409.09085; details after the authors' only_train_once (MIT). The optimizer steps
throughout, but in 1 and 2 the weights and moments return to those from before.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    EQUAL,
    clear_moments,
    directions,
    saliencies,
    scale_channels,
)
from smallfry.compress.prune.selection import Chosen
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.groups import ChannelGroup
from smallfry.transforms.spec import Transform

SHARES = (0.25, 0.5, 0.75)  # of a group's channels that are set to zero in the projection


@register_method
@dataclass(frozen=True)
class CRIC:
    """Structured pruning while training: a search for channels to protect (CRIC), then HESSO.

    It needs the loss of each step: training runs pass it, and a loop of one's own calls
    ``Session.observe``. A moving average of the weights takes in the search; leave ``ema.decay`` 0,
    or train much longer than the average remembers.

    Args:
        sparsity: Share to remove, in [0, 1).
        of: Unit of the share: channels of all groups; macs, multiply-accumulates of all calls for
            one image; or ms, by a table of latencies. The result doesn't exceed the last two, and
            the channels that go are the least salient for what they save.
        table: File of measured latencies, of ms.
        begin: When the search begins, as a share of the run up to 1, or in steps above 1.
        shrinking: Duration of the shrinking after it, likewise.
        sampling_steps: Steps of a sampling cycle (S).
        cycles: Most sampling cycles.
        tolerance: The search ends when so few channels are left to try.
        loss_weight: Weight of the relative losses of the projection.
        divisible: Survivors of a group are a multiple, or all; heads go one by one.
        weights: Weights of the scores magnitude, mean magnitude, cosine, Taylor and its square.
        cosine_sign: 1 as in the authors' code; −1 prefers channels that steps move towards zero.
        include: Shell patterns of group names, which are layer names.
        exclude: Patterns of groups to keep unchanged.

    Example:
        >>> from smallfry import compress
        >>> compress.CRIC(sparsity=0.3, begin=10, sampling_steps=20).cycles
        10
    """

    name: ClassVar[str] = "cric"
    trains: ClassVar[bool] = True

    sparsity: float = 0.5
    of: Of = "channels"
    table: str | None = None
    begin: float = 0.1
    shrinking: float = 0.3
    sampling_steps: int = 10
    cycles: int = 10
    tolerance: int = 0
    loss_weight: float = 1.0
    divisible: int = 8
    weights: tuple[float, ...] = EQUAL
    cosine_sign: int = 1
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_prunable(self)
        require_scores(self.name, self.weights, self.cosine_sign)
        if self.begin < 0 or self.shrinking <= 0 or self.loss_weight < 0 or self.tolerance < 0:
            raise UsageError(
                "cric.begin, loss_weight and tolerance are at least 0, and shrinking above 0"
            )
        if self.sampling_steps < 1 or self.cycles < 1:
            raise UsageError("cric.sampling_steps and cycles must be at least 1")

    def start(self) -> Method:
        """Create the method with these settings."""
        return RunningCRIC(self)


class RunningCRIC(ChannelMethod):
    """State of CRIC.

    Attributes:
        active: Channels that are tried in the sampling cycle, of each group.
        history: Channels that were tried in any.
        trial: Channels to try next.
        redundant: Channels that shrink after the search.
        losses: Relative losses of the projection, of each group.
        cycle: −1 before the search, 0 in the projection, 1 and more in sampling.
    """

    def __init__(self, settings: CRIC) -> None:
        super().__init__(settings)
        self._settings = settings
        self._loss: Tensor | None = None
        self._before: dict[str, Tensor] = {}

    def use(self, model: nn.Module, groups: Sequence[ChannelGroup], setting: Setting) -> None:
        """Start on given groups; see ``ChannelMethod.use``."""
        super().use(model, groups, setting)
        wanted, steps = self._settings, setting.steps
        self._first = max(1, steps_of(wanted.begin, steps))
        self._sampling = self._first + 2 * len(SHARES) * len(groups)
        self._shrinking = max(1, steps_of(wanted.shrinking, steps))
        needed = self._sampling + wanted.sampling_steps * wanted.cycles + self._shrinking
        if needed > steps:
            raise UsageError(
                f"cric needs {needed} steps for {len(groups)} groups, and the run has {steps}: "
                "train longer, or take fewer cycles, sampling_steps or a shorter shrinking"
            )
        self._t = 0  # steps taken
        self._ended = 0  # step in which the search ended; 0 before
        self.cycle = -1
        self._total = 0
        self._sums = [torch.zeros(g.channels, dtype=torch.float64) for g in groups]
        self._count = 0
        self._first_loss = 0.0
        self.losses: list[list[float]] = [[] for _ in groups]
        self._cache: dict[str, Tensor] = {}
        self._moments: dict[str, dict[str, Tensor]] = {}
        self.active, self.history, self.trial, self.redundant = (_none(groups) for _ in range(4))

    @property
    def is_searching(self) -> bool:
        """True at steps whose weights are put back."""
        return self._t >= self._first and not self._ended

    def observe(self, loss: Tensor) -> None:
        """Take the loss of the step that comes."""
        self._loss = loss

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Copy the weights during the search."""
        self._t += 1
        if not self.is_searching:
            return
        if self._loss is None:
            raise UsageError("cric needs the loss: call session.observe(loss) before each step")
        self._before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        if self._t == self._first:
            self._first_loss = float(self._loss)
            self._cache = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
            self._moments = _moments(optimizer, self.model)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Search, then shrink."""
        if self.is_searching:
            assert self._loss is not None
            relative = float(self._loss) / self._first_loss
            totals = self._score(optimizer)
            if self._t < self._sampling:
                self._project(totals, relative)
            else:
                self._sample(totals, optimizer)
            self._before = {}
        elif self._ended:
            self._shrink(optimizer)
        self._loss = None

    def _score(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        before = {name: self._before[name] for name in self.moved}
        moved = directions(optimizer, before, self.tensors)
        wanted = self._settings
        totals, _ = saliencies(self.scored, before, moved, wanted.weights, wanted.cosine_sign)
        for total, fresh in zip(self._sums, totals, strict=True):
            total += fresh
        self._count += 1
        return self.priced(totals)

    def _project(self, totals: list[Tensor], relative: float) -> None:
        """Set the least salient channels of one group to zero, and note the loss a step later."""
        if self.cycle < 0:
            self.cycle, self._total = 0, self.target(totals)
        number, is_second = divmod(self._t - self._first, 2)
        group, share = divmod(number, len(SHARES))
        if is_second:
            self.losses[group].append(relative)
            self._restore(self._cache)
            return
        self._restore(self._before)
        count = max(1, int(SHARES[share] * self.groups[group].channels))
        order = totals[group].sort(stable=True).indices[:count].tolist()
        scale_channels(self.groups[group], self.tensors, order, 0.0)

    def _sample(self, totals: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Train with the channels that are tried shrinking."""
        length = self._settings.sampling_steps
        done, position = divmod(self._t - self._sampling, length)
        low = self._lowest(totals)
        if position == 0:
            self.cycle += 1
            tried = low if self.cycle == 1 else _difference(self.trial, self.history)
            self.active = tried
            self.history = _union(self.history, tried)
            few = sum(map(len, tried)) <= self._settings.tolerance and self.cycle > 1
            if few or done == self._settings.cycles:
                self._conclude(optimizer)
                return
        self.trial = _union(
            _difference(self.trial, self.history),
            _difference(_difference(low, self.active), self.history),
        )
        zeroed = self.zeroed
        for name, parameter in self.model.named_parameters():
            if name not in zeroed:
                parameter.copy_(self._before[name])
            elif position == 0:
                parameter.copy_(self._cache[name] + (parameter - self._before[name]))
        late = (position - 1) % length  # as the authors have it: a cycle's first step is its last
        factor = (length - late - 1) / (length - late)
        for group, active in zip(self.groups, self.active, strict=True):
            scale_channels(group, self.tensors, active, factor)

    def _lowest(self, totals: list[Tensor]) -> Chosen:
        """List the least salient channels, unrounded."""
        every = torch.cat(totals)
        positions = every.topk(self._total, largest=False).indices
        chosen, offset = [], 0
        for total in totals:
            inside = (positions >= offset) & (positions < offset + len(total))
            chosen.append(sorted((positions[inside] - offset).tolist()))
            offset += len(total)
        return chosen

    def _conclude(self, optimizer: torch.optim.Optimizer) -> None:
        """End the search: choose the redundant channels, and put weights and moments back."""
        final = self.final_scores()
        self.redundant = self.choose_rest(self.priced(final))
        self._restore(self._cache)
        _set_moments(optimizer, self.model, self._moments)
        self._ended, self._cache, self._moments = self._t, {}, {}
        self.active = _none(self.groups)

    def final_scores(self) -> list[Tensor]:
        """Return the saliencies of the whole search, (channels,) of each group."""
        weight = self._settings.loss_weight
        return [
            total / self._count + weight * (sum(losses) / len(losses)) / len(total)
            for total, losses in zip(self._sums, self.losses, strict=True)
        ]

    def _shrink(self, optimizer: torch.optim.Optimizer) -> None:
        left = self._shrinking - (self._t - self._ended)
        factor = left / (left + 1) if left > 0 else 0.0
        for group, redundant, gone in zip(self.groups, self.redundant, self.gone, strict=True):
            scale_channels(group, self.tensors, redundant, factor)
            scale_channels(group, self.tensors, gone, 0.0)
        if left == 0:
            for group, redundant in zip(self.groups, self.redundant, strict=True):
                clear_moments(optimizer, group, self.tensors, redundant)
            self.gone, self.redundant = self.redundant, _none(self.groups)

    def _restore(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters, and buffers that the values have."""
        now = self.model.state_dict()
        for name, value in values.items():
            now[name].copy_(value)

    def finish(self, model: nn.Module) -> Transform | None:
        """Cut the channels that are gone."""
        if self._t and not any(self.gone):
            warnings.warn(
                f"the run ended after {self._t} steps, before cric removed any channel",
                SmallfryWarning,
                stacklevel=2,
            )
        return super().finish(model)

    def state_dict(self) -> dict[str, Any]:
        """Return channels, scores, the position, and the weights to return to in the search."""
        lists = ("active", "history", "trial", "redundant", "losses")
        return {
            **super().state_dict(),
            **{name: [list(each) for each in getattr(self, name)] for name in lists},
            "position": [self._t, self._ended, self.cycle, self._total, self._count],
            "first_loss": self._first_loss,
            "sums": list(self._sums),
            "cache": dict(self._cache),
            "moments": {name: dict(each) for name, each in self._moments.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        super().load_state_dict(state)
        for name in ("active", "history", "trial", "redundant", "losses"):
            setattr(self, name, [list(each) for each in state[name]])
        self._t, self._ended, self.cycle, self._total, self._count = state["position"]
        self._first_loss = state["first_loss"]
        self._sums = [each.clone() for each in state["sums"]]
        self._cache = dict(state["cache"])
        self._moments = {name: dict(each) for name, each in state["moments"].items()}


def _none(groups: Sequence[ChannelGroup]) -> Chosen:
    return [[] for _ in groups]


def _union(one: Chosen, other: Chosen) -> Chosen:
    return [sorted({*a, *b}) for a, b in zip(one, other, strict=True)]


def _difference(one: Chosen, other: Chosen) -> Chosen:
    return [sorted({*a} - {*b}) for a, b in zip(one, other, strict=True)]


def _moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Copy an optimizer's moments of the shapes of their parameters."""
    return {
        name: {
            key: value.detach().clone()
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def _set_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put moments back; those that began since are zeroed."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                before = moments.get(name, {}).get(key)
                value.zero_() if before is None else value.copy_(before)
