"""Erasing of operators: residual branches that a network can do without (after OTOv3, H2SPG).

Candidates are chains of operators that end at an addition. Once, the most redundant ones are chosen
so that the network stays connected; they are driven to zero as DHSPG's channels, and erased at the
end. Chen et al., arXiv 2312.09411, whose code for this has not appeared: the procedure is ours.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.compress.prune.channels import steps_of
from smallfry.compress.prune.dhspg import DHSPG, RunningDHSPG, redundancy
from smallfry.compress.prune.graphs import (
    Segment,
    choose_connected,
    find_segments,
    trace,
    zero_segments,
)
from smallfry.compress.prune.saliency import TINY, clear_moments, scale_channels
from smallfry.compress.prune.selection import Chosen
from smallfry.compress.select import chosen
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.declared import declared_groups
from smallfry.transforms.erased import Erase
from smallfry.transforms.groups import ChannelGroup, Slice
from smallfry.transforms.spec import Transform

FIELDS = ("zeros", "skipped", "whole")
TOLERANCE = 1e-4  # between outputs zeroed and erased, relative to the largest, in float32


@register_method
@dataclass(frozen=True)
class EraseOperators:
    """Erasing of residual branches while training (after OTOv3).

    Args:
        sparsity: Share of the candidates to erase, in [0, 1).
        begin: When they are chosen, as a share of the run up to 1, or in steps above 1.
        end: When the last is zero, likewise.
        include: Shell patterns of the candidates' first modules; of ViTRM's, those of attention
            and MLP.
        exclude: Patterns of candidates to keep.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry import compress
        >>> model = timm.create_model("resnet8_mlperf_tiny")
        >>> images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.01)
        >>> erase = compress.EraseOperators(sparsity=0.3, begin=0, end=4)
        >>> session = compress.Session(model, [erase], images[:2], steps=4)
        >>> session.attach(optimizer)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(images), labels).backward()
        ...     _ = optimizer.step()
        >>> [each.kind for each in session.finish().transforms]
        ['erase']
    """

    name: ClassVar[str] = "erase_operators"
    trains: ClassVar[bool] = True

    sparsity: float = 0.25
    begin: float = 0.1
    end: float = 0.6
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"erase_operators.sparsity must be in [0, 1), not {self.sparsity}")
        if self.begin < 0 or self.end <= 0:
            raise UsageError("erase_operators.begin is at least 0, and end above 0")

    def start(self) -> Method:
        """Create the method with these settings."""
        return RunningErase(self)


class RunningErase(RunningDHSPG):
    """State of the erasing; a candidate is a group of one channel."""

    def __init__(self, settings: EraseOperators) -> None:
        super().__init__(DHSPG(settings.sparsity, settings.begin, tolerance=0.0, divisible=1))
        self._wanted = settings

    def begin(self, model: nn.Module, setting: Setting) -> None:
        """Find the candidates.

        Raises:
            UsageError: No example, no candidate, or no steps between begin and end.
        """
        if not setting.example.numel():
            raise UsageError("erase_operators needs example inputs: pass two inputs")
        self.graph = trace(model)
        found = branches(model) if self.graph is None else find_segments(self.graph)
        transforms = {s.name: erasing(model, s, setting.example) for s in found if s.is_added}
        every = {s.name: s for s in found if transforms.get(s.name) is not None}
        wanted = self._wanted
        names = chosen(every, wanted.include, wanted.exclude, "branch that can be erased")
        self.segments = [every[name] for name in names]
        if self.graph is None:
            self.connections = Connections(model, setting.example)
        self.transforms = [t for name in names if (t := transforms[name]) is not None]
        self._end = steps_of(wanted.end, setting.steps)
        if self._end > setting.steps or self._end <= steps_of(wanted.begin, setting.steps):
            raise UsageError(
                f"erase_operators needs steps between begin and end: end is {self._end} of "
                f"{setting.steps} steps of the run"
            )
        self.use(model, [_group(model, each) for each in self.segments], setting)

    def _chosen(self, x: Sequence[Tensor], d: Sequence[Tensor]) -> Chosen:
        """Choose the most redundant candidates that leave the network connected."""
        scores = torch.cat(redundancy(x, d))
        order = scores.argsort(descending=True, stable=True).tolist()
        number = int(len(order) * self._wanted.sparsity)
        if self.graph is not None:
            accepted = choose_connected(self.graph, self.segments, order, number)
        else:
            accepted = []
            for each in order:
                taken = [self.transforms[n] for n in (*accepted, each)]
                if len(accepted) < number and self.connections.hold(taken):
                    accepted.append(each)
        return [[0] if each in accepted else [] for each in range(len(order))]

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Choose at first, then drive to zero what was chosen."""
        self._left = max(1, self._end - step)
        super().after_step(optimizer, step)
        if step + 1 >= self._end and self.penalised is not None:
            for number, (group, active) in enumerate(zip(self.groups, self.penalised, strict=True)):
                scale_channels(group, self.tensors, active, 0.0)
                clear_moments(optimizer, group, self.tensors, active)
                self.gone[number] = list(active)

    def _penalise(
        self,
        number: int,
        penalised: Sequence[int],
        x: Tensor,
        d: Tensor,
        rates: Mapping[str, float],
    ) -> None:
        """Shrink what was chosen evenly, so that it is zero at the end."""
        super()._penalise(number, penalised, x, d, rates)
        factor = (self._left - 1) / self._left
        scale_channels(self.groups[number], self.tensors, penalised, max(factor, TINY))

    def finish(self, model: nn.Module) -> Transform | None:
        """Erase what is zero."""
        erased = [t for t, gone in zip(self.transforms, self.gone, strict=True) if gone]
        chosen = sum(map(len, self.penalised or []))
        if len(erased) < chosen:
            warnings.warn(
                f"the run ended when {len(erased)} of {chosen} chosen operators were zero; the "
                "others stay",
                SmallfryWarning,
                stacklevel=2,
            )
        if not erased:
            return None
        transform = Erase(
            *([name for each in erased for name in getattr(each, key)] for key in FIELDS)
        )
        transform.apply(model)
        return transform

    def state_dict(self) -> dict[str, Any]:
        """Return the candidates, and the state of DHSPG."""
        return {**super().state_dict(), "transforms": [asdict(each) for each in self.transforms]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        super().load_state_dict(state)
        self.transforms = [Erase(**each) for each in state["transforms"]]


def branches(model: nn.Module) -> list[Segment]:
    """Find the branches that blocks declare, of a model that can't be traced.

    A block lists the modules of each by ``residual_branches``; of other blocks, gated MLPs whose
    units are known are taken.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        listed = getattr(module, "residual_branches", None)
        for parts in listed() if callable(listed) else ():
            whole = tuple(f"{name}.{part}" if name else part for part in parts)
            found[whole[-1]] = whole
    for group in declared_groups(model):
        owner = group.name.rpartition(".")[0]
        if owner and not group.counts:
            found.setdefault(owner, (owner,))
    return [Segment(modules, modules, "", True, name) for name, modules in found.items()]


class Connections:
    """Parameters with a part in a model's output, without some of its branches.

    Args:
        model: Copied, with random weights, since what starts at zero passes no gradient.
        example: A batch of inputs.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model, self.example = copy.deepcopy(model).eval().requires_grad_(True), example
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            inputs = max(1, parameter.numel() // len(parameter)) if parameter.ndim else 1
            drawn = torch.randn(parameter.shape, generator=generator) / inputs**0.5
            parameter.data.copy_(drawn)
        self.used = self._used(self.model)

    def hold(self, transforms: Sequence[Erase]) -> bool:
        """Return whether all parameters that had a part, and are left, have one after erasing."""
        erased = copy.deepcopy(self.model)
        for transform in transforms:
            transform.apply(erased)
        left = {name for name, _ in erased.named_parameters()}
        return self.used & left <= self._used(erased)

    def _used(self, model: nn.Module) -> set[str]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        with torch.enable_grad():
            outputs = model(self.example)
            if not outputs.requires_grad:
                return set()
            got = torch.autograd.grad(outputs.square().sum(), parameters, allow_unused=True)
        used = zip(names, got, strict=True)
        return {name for name, each in used if each is not None and each.any()}


@torch.no_grad()
def erasing(model: nn.Module, segment: Segment, example: Tensor) -> Erase | None:
    """Return what erases a segment as if it were at zero; None if nothing does.

    Args:
        model: Left as it is.
        segment: One of its segments.
        example: A batch of inputs.
    """
    zeroed = copy.deepcopy(model).eval()
    zero_segments(zeroed, [segment])
    expected = zeroed(example)
    last, others = segment.modules[-1], segment.modules[:-1]
    for transform in (Erase([last], others), Erase([last], others, [last])):
        erased = copy.deepcopy(model).eval()
        try:
            transform.apply(erased)
            given = erased(example)
        except Exception:  # of shapes or attributes that something else needs
            continue
        distance = (expected - given).abs().max() if expected.shape == given.shape else torch.inf
        if distance <= TOLERANCE * expected.abs().max().clamp(min=1e-6):
            return transform
    return None


def _group(model: nn.Module, segment: Segment) -> ChannelGroup:
    slices = tuple(
        Slice(f"{name}.{leaf}", 0, torch.arange(len(parameter))[None])
        for name in segment.modules
        for leaf, parameter in model.get_submodule(name).named_parameters()
        if parameter.ndim
    )
    return ChannelGroup(segment.name, 1, slices, slices)
