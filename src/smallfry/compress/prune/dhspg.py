"""DHSPG: channels driven to zero by a penalty and a projection onto half-spaces, any optimizer.

Once, channels that look redundant are chosen to be penalised: those whose steps move them towards
zero, and whose weights are small. While too few channels are zero, each of them is moved towards
zero in every step, by at least as much as makes its norm fall and by so little that the step still
descends; one that would pass zero is set to zero for good (Chen et al., OTOv2, arXiv 2303.06862;
details after the authors' only_train_once, MIT).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.compress.prune.channels import ChannelMethod, Of, require_prunable, steps_of
from smallfry.compress.prune.saliency import (
    TINY,
    channel_vectors,
    clear_moments,
    directions,
    scale_channels,
)
from smallfry.compress.prune.selection import Chosen, lowest_blocks
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.groups import ChannelGroup
from smallfry.transforms.spec import Transform


@register_method
@dataclass(frozen=True)
class DHSPG:
    """Structured pruning while training by dual half-space projected gradients (DHSPG).

    Args:
        sparsity: Share of all groups' channels to remove, in [0, 1).
        begin: When channels are chosen, as a share of the run up to 1, or in steps above 1.
        tolerance: Share that is penalised above ``sparsity``, as not all reach zero.
        strength: Least step of a penalised channel towards zero, over the learning rate. The
            authors have 1e-3 for SGD and 1e-2 for Adam; a short run needs more.
        amplify: Factor of the penalty that just makes a channel's norm fall.
        cap: Largest penalty, as a multiple of ``strength``.
        epsilon: A channel is zero once its product with its former value falls below this share.
        upper: Largest share of a group's channels that goes.
        divisible: Survivors of a group are a multiple, or all; heads go one by one.
        reference_selection: Choose by the authors' rule, which rounds in each group for itself and
            may leave too few.
        include: Shell patterns of group names, which are layer names.
        exclude: Patterns of groups to keep unchanged.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry import compress
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> dhspg = compress.DHSPG(sparsity=0.5, begin=2, strength=5.0)
        >>> session = compress.Session(model, [dhspg], images[:2], steps=8)
        >>> session.attach(optimizer)
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(images), labels).backward()
        ...     _ = optimizer.step()
        >>> _ = session.finish()
        >>> sum(p.numel() for p in model.parameters()) < 0.8 * 109_131
        True
    """

    name: ClassVar[str] = "dhspg"
    trains: ClassVar[bool] = True

    sparsity: float = 0.5
    begin: float = 0.1
    tolerance: float = 0.05
    strength: float = 1e-3
    amplify: float = 2.0
    cap: float = 10.0
    epsilon: float = 0.0
    upper: float = 1.0
    divisible: int = 8
    reference_selection: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_prunable(self)
        if self.begin < 0 or self.tolerance < 0 or self.strength <= 0:
            raise UsageError("dhspg.begin and tolerance are at least 0, and strength is above 0")
        if self.amplify <= 1 or self.cap < 1:
            raise UsageError("dhspg.amplify is above 1, and cap at least 1")
        if not 0 <= self.epsilon < 1 or not 0 < self.upper <= 1:
            raise UsageError("dhspg.epsilon is in [0, 1), and upper in (0, 1]")

    @property
    def of(self) -> Of:
        """Unit of the share: channels."""
        return "channels"

    @property
    def table(self) -> str | None:
        """No table of latencies."""
        return None

    def start(self) -> Method:
        """Create the method with these settings."""
        return RunningDHSPG(self)


class RunningDHSPG(ChannelMethod):
    """State of DHSPG.

    Attributes:
        penalised: Channels that are driven to zero, of each group; those at zero among them.
    """

    def __init__(self, settings: DHSPG) -> None:
        super().__init__(settings)
        self._settings = settings

    def use(self, model: nn.Module, groups: Sequence[ChannelGroup], setting: Setting) -> None:
        """Start on given groups; see ``ChannelMethod.use``."""
        super().use(model, groups, setting)
        self._first = steps_of(self._settings.begin, setting.steps)
        if self._first >= setting.steps:
            raise UsageError(
                f"dhspg.begin {self._first} leaves no step of {setting.steps}: begin earlier"
            )
        self.penalised: Chosen | None = None
        self._before: dict[str, Tensor] = {}

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Copy the weights of channels."""
        if step >= self._first:
            names = self.moved | self.zeroed
            self._before = {name: self.tensors[name].detach().clone() for name in names}

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Choose channels at first, then penalise and project them."""
        if not self._before:
            return
        moved = directions(optimizer, self._before, self.tensors)
        x = [channel_vectors(group, self._before) for group in self.scored]
        d = [channel_vectors(group, moved) for group in self.scored]
        if self.penalised is None:
            self.penalised = self._chosen(x, d)
        total = sum(group.channels for group in self.groups)
        if sum(map(len, self.gone)) < self._settings.sparsity * total:
            rates = _rates(optimizer, self.tensors, self.zeroed)
            for number, penalised in enumerate(self.penalised):
                self._penalise(number, penalised, x[number], d[number], rates)
        self._project(optimizer)
        self._before = {}

    def _chosen(self, x: Sequence[Tensor], d: Sequence[Tensor]) -> Chosen:
        """Choose the channels to penalise, so that the others are multiples."""
        scores = redundancy(x, d)
        share = min(self._settings.sparsity + self._settings.tolerance, 0.999)
        number = int(sum(map(len, scores)) * share)
        if self._settings.reference_selection:
            return _reference_choice(scores, number, self._settings.divisible)
        return lowest_blocks([-each for each in scores], self.gone, number, self.blocks)

    def _penalise(
        self,
        number: int,
        penalised: Sequence[int],
        x: Tensor,
        d: Tensor,
        rates: Mapping[str, float],
    ) -> None:
        """Move channels towards zero, in place."""
        group = self.groups[number]
        for channel in penalised:
            norm = x[channel].norm()
            strength = penalty(
                x[channel], d[channel], self._settings.strength, self._settings.amplify,
                self._settings.cap,
            )  # fmt: skip
            for each in group.zeroed:
                tensor = self.tensors[each.tensor]
                rows = each.entries[channel].to(tensor.device)
                old = self._before[each.tensor].index_select(each.dim, rows)
                factor = rates.get(each.tensor, 0.0) * strength / (float(norm) + TINY)
                tensor.detach().index_add_(each.dim, rows, old, alpha=-factor)

    def _project(self, optimizer: torch.optim.Optimizer) -> None:
        """Set penalised channels to zero that have left their half-space, and keep zeros."""
        assert self.penalised is not None
        pairs = zip(self.groups, self.scored, self.penalised, self.gone, strict=True)
        for number, (group, scored, penalised, gone) in enumerate(pairs):
            x = channel_vectors(scored, self._before)
            products = (channel_vectors(scored, self.tensors) * x).sum(1)
            least = self._settings.epsilon * x.square().sum(1)
            room = int(group.channels * self._settings.upper) - len(gone)
            left = [c for c in penalised if c not in gone and bool(products[c] < least[c])]
            left = sorted(left, key=lambda c: float(products[c]))[: max(0, room)]
            self.gone[number] = sorted([*gone, *left])
            scale_channels(group, self.tensors, self.gone[number], 0.0)
            clear_moments(optimizer, group, self.tensors, self.gone[number])

    def finish(self, model: nn.Module) -> Transform | None:
        """Cut the channels that are zero, as far as survivors are multiples."""
        if self.penalised is not None and not any(self.gone):
            warnings.warn(
                "dhspg removes no channels, as none reached zero: train longer, or raise strength",
                SmallfryWarning,
                stacklevel=2,
            )
        every = self.gone
        self.gone = [
            out[: len(out) - (-(group.channels - len(out))) % block]
            for group, out, block in zip(self.groups, every, self.blocks, strict=True)
        ]
        try:
            return super().finish(model)
        finally:
            self.gone = every

    def state_dict(self) -> dict[str, Any]:
        """Return the channels that are penalised and those that are zero."""
        return {**super().state_dict(), "penalised": self.penalised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        super().load_state_dict(state)
        chosen = state["penalised"]
        self.penalised = None if chosen is None else [list(each) for each in chosen]


def redundancy(x: Sequence[Tensor], d: Sequence[Tensor]) -> list[Tensor]:
    """Score channels: high for those that steps move towards zero, and for small ones.

    Args:
        x: Values of each group, (channels, values).
        d: Directions of the same shapes.

    Returns:
        Half the cosine and half the inverse mean magnitude, each scaled to unit norm over all.
    """
    cosines = [
        (v * w).sum(1) / ((v.norm(dim=1) + TINY) * (w.norm(dim=1) + TINY))
        for v, w in zip(x, d, strict=True)
    ]
    inverse = [1 / (v.norm(dim=1) / v.shape[1] + 1e-6) for v in x]
    parts = [(torch.cat(each).norm(), each) for each in (cosines, inverse)]
    return [
        sum((each[g] / (2 * (norm + TINY)) for norm, each in parts), start=torch.zeros(()))
        for g in range(len(x))
    ]


def _reference_choice(scores: Sequence[Tensor], number: int, divisible: int) -> Chosen:
    """Choose as only_train_once does: the rest of each group is rounded for itself."""
    candidates = set(torch.cat(list(scores)).topk(number).indices.tolist())
    found, offset = [], 0
    for score in scores:
        size = len(score)
        among = sum(offset + channel in candidates for channel in range(size))
        kept = max(round((size - among) / divisible), 1) * divisible
        order = score.sort(stable=True).indices.tolist()
        found.append([] if size <= divisible else sorted(order[kept:]))
        offset += size
    return found


def penalty(x: Tensor, d: Tensor, strength: float, amplify: float, cap: float) -> float:
    """Compute how far a channel is moved towards zero in a step of rate 1.

    Where the step alone would make its norm grow, it lies between the bounds at which the norm
    begins to fall and the loss to rise.

    Args:
        x: Values of the channel, (values,).
        d: Their direction.
        strength: The least, where it is within the bounds.
        amplify: Factor of the lower bound.
        cap: Most, as a multiple of ``strength``.
    """
    inner, norm = float((x * d).sum()), float(x.norm())
    if inner >= 0 or norm == 0:
        return strength
    low = -inner / norm
    high = -float(d.square().sum()) * norm / inner
    found = min(max(amplify * low, strength), cap * strength)
    return (low + high) / 2 if found >= high else found


def _rates(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: set[str]
) -> dict[str, float]:
    """Return the learning rates of parameters; those without one are frozen."""
    by_id = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: rate for name in names if (rate := by_id.get(id(tensors[name]), 0.0))}
