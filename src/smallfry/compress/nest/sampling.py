"""Training of several sub-models in one step: each computes a part of the batch.

The model's class is replaced by a subclass whose ``forward`` (and ``advance`` of a recursive model)
splits the batch in training mode. The gradient is the mean of those of the sub-models, as by
gradient accumulation. In evaluation mode it is the full model.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smallfry._torch import has_forward_hooks
from smallfry.errors import UsageError
from smallfry.models.contract import map_tensors, replace_tensors, tensors
from smallfry.transforms.nested import Nest, SubModel, active, nest_of
from smallfry.transforms.shorten import owner_of

LEAST = 2  # images of a part, as batch norms need


class Sampling(NamedTuple):
    """Distribution of sub-models in training."""

    parts: int  # of a batch
    full: float  # probability that the first part is the full model's

    def draw(self, submodels: Sequence[SubModel], images: int) -> list[SubModel]:
        """Draw the sub-models of a batch from PyTorch's random state on the CPU.

        Args:
            submodels: All of them, the full one first.
            images: Images of the batch; a few of them have fewer parts.
        """
        parts = max(1, min(self.parts, images // LEAST))
        numbers = torch.randint(len(submodels), (parts,))
        if float(torch.rand(())) < self.full:
            numbers[0] = 0
        return [submodels[number] for number in numbers.tolist()]


def begin_sampling(model: nn.Module, nest: Nest, sampling: Sampling) -> None:
    """Train the sub-models of a model from now on, in place."""
    vars(model).update(nest=nest, sampling=sampling, plain_class=type(model))
    kind: Any = type(model)
    model.__class__ = _sampled_class(kind)


def end_sampling(model: nn.Module) -> None:
    """Return the model to its own class."""
    model.__class__ = vars(model).pop("plain_class")
    for name in ("nest", "sampling"):
        vars(model).pop(name)


@cache
def _sampled_class(kind: Any) -> Any:
    def forward(self: Any, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        def call(part: Tensor, _: Any) -> Any:
            return kind.forward(self, part, *args, **kwargs)

        return _in_parts(self, call, images, None)

    def advance(self: Any, images: Tensor, state: Any = None) -> Any:
        def call(part: Tensor, part_state: Any) -> Any:
            return kind.advance(self, part, part_state)

        return _in_parts(self, call, images, state)

    methods: dict[str, Any] = {"forward": forward, "__doc__": kind.__doc__}
    if hasattr(kind, "advance"):
        methods["advance"] = advance
    return type(kind.__name__, (kind,), methods)


def _in_parts(model: Any, call: Callable[[Tensor, Any], Any], images: Tensor, state: Any) -> Any:
    nest = nest_of(model)
    if not model.training or nest.is_active:
        return call(images, state)
    if torch.compiler.is_compiling():
        raise UsageError("sorted_net doesn't train a compiled model; leave compile out")
    chosen = model.sampling.draw(nest.nested.submodels, len(images))
    outputs = []
    ends = torch.arange(len(images)).tensor_split(len(chosen))
    for submodel, rows in zip(chosen, ends, strict=True):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        _require_unobserved(model, nest, submodel)
        with active(model, submodel):
            outputs.append(call(images[here], _part(state, here, len(images))))
    if len(outputs) == 1:
        return outputs[0]
    joined = [torch.cat(parts) for parts in zip(*map(tensors, outputs), strict=True)]
    return replace_tensors(outputs[0], joined)


def _part(state: Any, rows: slice, batch: int) -> Any:
    """Take rows of a state; what all images have in common stays."""
    if state is None:
        return None
    return map_tensors(lambda each: each[rows] if len(each) == batch else each, state)


def _require_unobserved(model: nn.Module, nest: Nest, submodel: SubModel) -> None:
    """Refuse narrow layers under natural gradient, whose factors have the full size."""
    for name in nest.plan(model, submodel).entries:
        owner, _ = owner_of(model, name)
        if has_forward_hooks(owner):
            raise UsageError(
                f"the layer '{name.rpartition('.')[0]}' is observed in its full width, as by "
                "natural gradient or the distillation of features: train widths and heads without "
                "them (depths and steps train with any)"
            )
