"""Erasure of redundant operators: branches and steps (after OTOv3, H2SPG).

Candidates are operators that feed an addition and nothing else. Once, the most redundant ones are
chosen so that the network stays connected; they are driven to zero as DHSPG's channels, and erased
at the end. Steps of a recursion, which share their weights, are left out one after the other. Chen
et al., arXiv 2312.09411, whose code for this has not appeared: the procedure is ours.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry.compress.prune.candidates import Candidates
from smallfry.compress.prune.channels import steps_of
from smallfry.compress.prune.dhspg import DHSPG, RunningDHSPG, redundancy
from smallfry.compress.prune.graphs import Segment, parameters_of
from smallfry.compress.prune.saliency import TINY, clear_moments, scale_channels
from smallfry.compress.prune.selection import Chosen
from smallfry.compress.prune.steps import LeftOut, choose_steps, numbers_of_steps
from smallfry.compress.select import chosen
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.groups import ChannelGroup, Slice
from smallfry.transforms.shorten import steps_of as number_of_steps
from smallfry.transforms.spec import Transform

log = logging.getLogger(__name__)

WHILE_TRAINING = "latent_steps"  # the others' number is one of inference: they go at the end


@register_method
@dataclass(frozen=True)
class EraseOperators:
    """Erasing of residual branches and recursion steps while training (after OTOv3).

    Args:
        sparsity: Share of the branches to erase, and of the steps beyond the first, in [0, 1).
        begin: When they are chosen, as a share of the run up to 1, or in steps above 1.
        end: When the last is zero, likewise.
        include: Shell patterns of the branches' first modules (of ViTRM's, those of attention and
            MLP), and of latent_steps and recursion_steps.
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
    """State of the erasing; a branch is a group of one channel.

    Attributes:
        left_out: Steps that go, in order; None before the choice.
        passed: How many of them are gone.
    """

    removes = "layers"

    def __init__(self, settings: EraseOperators) -> None:
        super().__init__(DHSPG(settings.sparsity, settings.begin, tolerance=0.0, divisible=1))
        self._wanted = settings
        self.left_out: list[LeftOut] | None = None
        self.passed = 0

    def begin(self, model: nn.Module, setting: Setting) -> None:
        """Find the candidates.

        Raises:
            UsageError: No example, no candidate, or no steps between begin and end.
        """
        if not setting.example.numel():
            raise UsageError("erase_operators needs example inputs: pass two inputs")
        wanted = self._wanted
        self.candidates = Candidates(model, setting.example)
        every = [*self.candidates.segments, *numbers_of_steps(model, setting.example)]
        what = "branch or number of steps that can be erased"
        names = chosen(every, wanted.include, wanted.exclude, what)
        segments = [self.candidates.segments[n] for n in names if n in self.candidates.segments]
        self._numbers = [name for name in names if name not in self.candidates.segments]
        self._example = setting.example
        self._end = steps_of(wanted.end, setting.steps)
        if self._end > setting.steps or self._end <= steps_of(wanted.begin, setting.steps):
            raise UsageError(
                f"erase_operators needs steps between begin and end: end is {self._end} of "
                f"{setting.steps} steps of the run"
            )
        self.use(model, [_group(model, each) for each in segments], setting)

    def _chosen(self, x: Sequence[Tensor], d: Sequence[Tensor]) -> Chosen:
        """Choose the most redundant branches that leave the network connected."""
        scores = torch.cat(redundancy(x, d))
        names = [group.name for group in self.groups]
        number = int(len(names) * self._wanted.sparsity)
        steps = {each.name: each.kept for each in self.left_out or ()}
        accepted: list[str] = []
        for each in scores.argsort(descending=True, stable=True).tolist():
            trial = [*accepted, names[each]]
            if len(accepted) < number and self.candidates.hold(trial, steps):
                accepted = trial
        if len(accepted) < number:
            warnings.warn(
                f"{len(accepted)} branches are erased and not {number}: without a further one the "
                "network would not hold together",
                SmallfryWarning,
                stacklevel=2,
            )
        if accepted:
            log.info("erasing %s", ", ".join(accepted))
        return [[0] if name in accepted else [] for name in names]

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Choose at first, then drive to zero what was chosen."""
        if step < self._first:
            return
        if self.left_out is None:
            most = sum(number_of_steps(self.model, name) - 1 for name in self._numbers)
            number = int(most * self._wanted.sparsity)
            if not number and not int(len(self.groups) * self._wanted.sparsity):
                warnings.warn(
                    f"erase_operators erases nothing: {self._wanted.sparsity:g} of the branches "
                    f"({len(self.groups)}) and of the steps ({most}) is less than one; raise "
                    "sparsity",
                    SmallfryWarning,
                    stacklevel=2,
                )
            self.left_out = choose_steps(self.model, self._numbers, number, self._example)
            for each in self.left_out:
                log.info("%s to %d: outputs change by %.2g", each.name, each.kept, each.change)
        number = len(self.left_out) * (step + 1 - self._first) // (self._end - self._first)
        self._leave_out(min(len(self.left_out), number))
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

    def _leave_out(self, number: int) -> None:
        """Leave out the first steps of those chosen, in training as far as it depends on them."""
        self.passed = number
        for each in (self.left_out or [])[:number]:
            if each.name == WHILE_TRAINING:
                setattr(self.model, each.name, each.kept)

    def finish(self, model: nn.Module) -> Transform | None:
        """Erase what is zero."""
        pairs = zip(self.groups, self.gone, strict=True)
        erased = [group.name for group, gone in pairs if gone]
        done = len(erased) + self.passed
        chosen = sum(map(len, self.penalised or [])) + len(self.left_out or [])
        if done < chosen:
            warnings.warn(
                f"the run ended when {done} of {chosen} chosen branches and steps were at zero; "
                "the others stay",
                SmallfryWarning,
                stacklevel=2,
            )
        left_out = (self.left_out or [])[: self.passed]
        steps = {each.name: each.kept for each in left_out}
        gone = Counter(each.name for each in left_out)
        kept = [f"{name}: {count} of {count + gone[name]}" for name, count in steps.items()]
        lists = {"branches erased": erased, "steps kept": kept}
        self._report = {"method": self._wanted.name, "lists": lists}
        if not done:
            return None
        transform = self.candidates.without(erased, steps)
        transform.apply(model)
        return transform

    def state_dict(self) -> dict[str, Any]:
        """Return the state of DHSPG, and the steps."""
        left_out = None if self.left_out is None else [list(each) for each in self.left_out]
        return {**super().state_dict(), "left_out": left_out, "passed": self.passed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        super().load_state_dict(state)
        left_out = state["left_out"]
        self.left_out = None if left_out is None else [LeftOut(*each) for each in left_out]
        self._leave_out(state["passed"])


def _group(model: nn.Module, segment: Segment) -> ChannelGroup:
    """Return a branch as a group of one channel."""
    slices = tuple(
        Slice(name, 0, torch.arange(len(parameter))[None])
        for name in parameters_of(model, segment)
        if (parameter := model.get_parameter(name)).ndim
    )
    return ChannelGroup(segment.name, 1, slices, slices)
