"""Students of a teacher as transforms of its spec: erased branches, and narrower layers.

A branch that is added to another can be erased; the channels of a group can be cut to a share.
What is left keeps the teacher's weights, of a group those of the greatest norm.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smallfry.compress.prune.candidates import Candidates
from smallfry.costing import cost
from smallfry.errors import UsageError
from smallfry.search.n2n.layer import REMOVED, Layer
from smallfry.search.space import Candidate
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import ChannelGroup, cut
from smallfry.transforms.resize import CONVOLUTIONS, TRANSPOSED, tensors_of
from smallfry.transforms.spec import ModelSpec

__all__ = ["SHARES", "Student", "Students"]

SHARES = (0.25, 0.5, 1.0)
WIDTH = ":width"  # behind the name of a branch: of the channels that it is added to


class Student(NamedTuple):
    """Student with the teacher's weights."""

    model: nn.Module
    spec: ModelSpec


class Students:
    """All students of a teacher.

    Args:
        model: The teacher, left as it is.
        spec: Its identity.
        example: A batch of its inputs.
        shares: Shares of a layer's width, 1 among them.

    Raises:
        UsageError: Nothing of it can be erased or cut.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> spec = ModelSpec("vitrm_micro_patch4_8")
        >>> students = Students(build(spec), spec, torch.zeros(2, 1, 8, 8))
        >>> [(layer.name, layer.shares) for layer in students.layers][1]
        ('blocks.0.mlp', (0.0, 0.25, 0.5, 1.0))
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        example: Tensor,
        shares: Sequence[float] = SHARES,
    ) -> None:
        self.model, self.spec, self.example = copy.deepcopy(model).eval(), spec, example
        self._groups = {group.name: group for group in find_groups(self.model, example)}
        self._candidates = Candidates(self.model, example)
        self._segments = self._candidates.segments
        self._inner: dict[str, list[ChannelGroup]] = {}  # groups of each layer
        for group in self._groups.values():
            self._inner.setdefault(self._layer_of(group), []).append(group)
        order = {name: place for place, (name, _) in enumerate(self.model.named_modules())}
        names = sorted({*self._inner, *self._segments}, key=lambda name: order[_module(name)])
        if not names:
            raise UsageError(
                f"{spec.architecture} has no branch that can be erased and no channels that can "
                "be cut, so that it has no students; take another teacher"
            )
        widest = max(max(_sizes(self.model, name)[2:]) for name in names)
        self.layers = tuple(self._layer(name, tuple(shares), widest) for name in names)

    def build(self, student: Candidate) -> Student:
        """Build a student.

        Args:
            student: Share by layer.

        Raises:
            UsageError: Layers that the teacher does not have, or too few of them.
        """
        if {*student} != {layer.name for layer in self.layers}:
            raise UsageError(
                "a student needs a share for each layer: "
                + ", ".join(layer.name for layer in self.layers)
            )
        if not self._candidates.hold(_removed(student)):
            raise UsageError("this student is not connected: keep more of its layers")
        model, spec = copy.deepcopy(self.model), self.spec
        keep = {
            group.name: _strongest(model, group, share)
            for name, share in student.items()
            if REMOVED < share < 1
            for group in self._inner.get(name, [])
        }
        if keep:
            spec = spec.then(cut(model, list(self._groups.values()), keep))
        gone = _removed(student)
        if gone:
            erase = self._candidates.without(gone)
            erase.apply(model)
            spec = spec.then(erase)
        return Student(model, spec)

    def costs(self, student: Candidate) -> dict[str, float]:
        """Return the multiply-accumulates for one input, and the parameters."""
        found = cost(self.build(student).model, self.example[:1])
        return {"macs": float(found.macs), "parameters": float(found.parameters)}

    def _layer_of(self, group: ChannelGroup) -> str:
        """Return the branch that has all of a group's channels, or a name of the group's own."""
        owners = {each.tensor.rpartition(".")[0] for each in group.cut}
        for name, segment in self._segments.items():
            if all(_is_within(owner, segment.modules) for owner in owners):
                return name
        return group.name + (WIDTH if group.name in self._segments else "")

    def _layer(self, name: str, shares: tuple[float, ...], widest: int) -> Layer:
        widths = shares if name in self._inner else (1.0,)
        removed = (REMOVED,) if name in self._segments else ()
        kernel, stride, inputs, outputs = _sizes(self.model, name)
        return Layer(
            name, (*removed, *widths), kernel, stride, min(1, inputs / widest), outputs / widest
        )


def _removed(student: Candidate) -> list[str]:
    """Return the branches that a student is without."""
    return [name for name, share in student.items() if share == REMOVED]


def _is_within(owner: str, modules: Sequence[str]) -> bool:
    """Return whether a module is one of these, or inside of one."""
    return any(f"{owner}.".startswith(f"{each}.") for each in modules)


def _module(layer: str) -> str:
    """Return the module that a layer is named by."""
    return layer.removesuffix(WIDTH)


def _sizes(model: nn.Module, name: str) -> tuple[int, int, int, int]:
    """Return the kernel, stride, inputs and outputs of the first layer with weights."""
    for module in model.get_submodule(_module(name)).modules():
        if isinstance(module, CONVOLUTIONS + TRANSPOSED):
            return (
                module.kernel_size[0],
                module.stride[0],
                module.in_channels,
                module.out_channels,
            )
        if isinstance(module, nn.Linear):
            return 1, 1, module.in_features, module.out_features
    return 1, 1, 1, 1


def _strongest(model: nn.Module, group: ChannelGroup, share: float) -> Tensor:
    """Return the channels of the greatest norm, in their order."""
    tensors, squares = tensors_of(model), torch.zeros(group.channels, dtype=torch.float64)
    for each in group.zeroed:
        tensor = tensors[each.tensor].detach().double().movedim(each.dim, 0)
        rows = tensor.reshape(len(tensor), -1).square().sum(1)
        squares += rows[each.entries].sum(1)
    count = max(1, round(share * group.channels))
    return squares.argsort(descending=True, stable=True)[:count].sort().values
