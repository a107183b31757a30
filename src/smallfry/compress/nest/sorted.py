"""SortedNet: many sub-models trained at once in one model's weights.

A sub-model has the leading channels, heads and layers of the model, and fewer steps of a recursion.
Each part of a batch is computed by another one, drawn at random (Valipour et al., arXiv 2309.00255;
the distribution of the draws, and batch norms, are ours).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smallfry._torch import BatchNorm
from smallfry.compress.nest.sampling import Sampling, begin_sampling, end_sampling
from smallfry.compress.prune.magnitude import channel_sizes
from smallfry.compress.prune.selection import block_size, can_lose
from smallfry.compress.select import chosen
from smallfry.errors import UsageError
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import ChannelGroup
from smallfry.transforms.modes import evaluating
from smallfry.transforms.nested import (
    CHILD,
    Nest,
    Nested,
    SubModels,
    active,
    nest_of,
    plain_group,
    statistics,
)
from smallfry.transforms.resize import tensors_of
from smallfry.transforms.shorten import steps_of
from smallfry.transforms.spec import Transform

STEPS = ("latent_steps", "recursion_steps")


@register_method
@dataclass(frozen=True)
class SortedNet:
    """Nested sub-models, trained at once in one model's weights (SortedNet).

    The sub-models are all combinations of the sizes. A model with several of ``latent_steps`` or
    ``recursion_steps`` has those numbers, and its own.

    Args:
        widths: Shares of the hidden units and channels.
        heads: Shares of the heads of attention.
        depths: Shares of the layers of each sequence of equal layers.
        latent_steps: Numbers of latent steps.
        recursion_steps: Numbers of recursion steps; deep supervision trains each of them.
        samples: Sub-models of a step, each of which computes a part of the batch.
        full: Probability that the first of them is the full model.
        divisible: Widths are multiples of it, or the full width.
        sort: Order channels by the size of their weights first, which changes no output.
        include: Shell patterns of channel groups that become narrower.
        exclude: Patterns of groups that keep their width.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry import compress
        >>> from smallfry.transforms.nested import SubModel, active
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> nest = compress.SortedNet(widths=(0.5, 1.0), latent_steps=(1,))
        >>> session = compress.Session(model, [nest], torch.zeros(2, 1, 8, 8), steps=1)
        >>> _ = session.finish()
        >>> with active(model, SubModel(width=0.5, latent_steps=1)):
        ...     tuple(model(torch.zeros(2, 1, 8, 8)).shape)
        (2, 10)
    """

    name: ClassVar[str] = "sorted_net"
    trains: ClassVar[bool] = True

    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    heads: tuple[float, ...] = (1.0,)
    depths: tuple[float, ...] = (1.0,)
    latent_steps: tuple[int, ...] = ()
    recursion_steps: tuple[int, ...] = ()
    samples: int = 2
    full: float = 0.5
    divisible: int = 8
    sort: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("widths", "heads", "depths"):
            if not all(0 < share <= 1 for share in getattr(self, key)):
                raise UsageError(f"sorted_net.{key} are shares in (0, 1], not {getattr(self, key)}")
        for key in STEPS:
            if not all(type(n) is int and n >= 1 for n in getattr(self, key)):
                raise UsageError(f"sorted_net.{key} are whole numbers of 1 or more")
        if self.samples < 1 or self.divisible < 1 or not 0 <= self.full <= 1:
            raise UsageError(
                "sorted_net.samples and divisible are at least 1, and full is a probability"
            )

    def start(self) -> Method:
        """Create the method with these settings."""
        return RunningSortedNet(self)


class RunningSortedNet(Method):
    """State of SortedNet."""

    needs = ("channels", "layers")

    def __init__(self, settings: SortedNet) -> None:
        self._settings = settings

    def begin(self, model: nn.Module, setting: Setting) -> None:
        """Find what can be nested, order channels, and train sub-models from now on.

        Raises:
            UsageError: The model lacks what a setting makes smaller.
        """
        if not setting.example.numel():
            raise UsageError("sorted_net needs example inputs: pass example= with two inputs")
        self._model, self._batches = model, setting.batches
        self._rehearsal = setting.rehearsal
        groups = self._groups(model, setting.example)
        if self._settings.sort:
            for group in groups:
                sort_channels(model, group)
        self._nested = nested_of(model, self._settings, groups, setting.example)
        begin_sampling(model, Nest(self._nested), self._sampling)

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self._settings.samples, self._settings.full)

    def _groups(self, model: nn.Module, example: Tensor) -> list[ChannelGroup]:
        wanted = self._settings
        has = {
            "widths": min(wanted.widths, default=1) < 1,
            "heads": min(wanted.heads, default=1) < 1,
        }
        if not any(has.values()):
            return []
        every = {
            group.name: group
            for group in find_groups(model, example)
            if can_lose(group, wanted.divisible) and has["heads" if group.counts else "widths"]
        }
        for key, is_wanted in has.items():
            if is_wanted and not any(bool(g.counts) == (key == "heads") for g in every.values()):
                raise UsageError(
                    f"sorted_net.{key}: the model has no such group of channels that can be "
                    f"narrower; leave {key} at 1, or take a smaller divisible"
                )
        names = chosen(every, wanted.include, wanted.exclude, "group of channels")
        return [every[name] for name in names]

    def finish(self, model: nn.Module) -> Transform:
        """End the training of sub-models, and measure their batch norms' statistics."""
        end_sampling(model)
        self._nested.apply(model)
        if not self._rehearsal:
            estimate_statistics(model, self._batches)
        return self._nested

    def state_dict(self) -> dict[str, Any]:
        """Return the description of the sub-models."""
        return {"nested": asdict(self._nested)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the same sub-models."""
        self._nested = Nested(**state["nested"])
        vars(self._model)["nest"] = Nest(self._nested)


def nested_of(
    model: nn.Module, settings: SortedNet, groups: Sequence[ChannelGroup], example: Tensor
) -> Nested:
    """Describe the sub-models of a model.

    Raises:
        UsageError: Layers or steps that the model doesn't have, or too many combinations.
    """
    layers = sequences(model, example) if min(settings.depths, default=1) < 1 else {}
    if not layers and min(settings.depths, default=1) < 1:
        raise UsageError("sorted_net.depths: the model has no sequence of equal layers")
    steps: list[tuple[int | None, ...]] = []
    for key in STEPS:
        numbers, most = getattr(settings, key), steps_of(model, key)
        if numbers and max(numbers) > most:
            has = f"has {most}" if most else "has no such steps"
            raise UsageError(f"sorted_net.{key} {list(numbers)}: the model {has}")
        steps.append((None, *sorted({n for n in numbers if n < most}, reverse=True)))
    try:
        return Nested(
            [plain_group(group, block_size(group, settings.divisible)) for group in groups],
            layers,
            _falling(settings.widths),
            _falling(settings.heads),
            _falling(settings.depths),
            *steps,
        )
    except ValueError as error:
        raise UsageError(f"sorted_net: {error}") from error


def _falling(shares: Iterable[float]) -> tuple[float, ...]:
    return tuple(sorted({1.0, *map(float, shares)}, reverse=True))


@torch.no_grad()
def sequences(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Find the sequences of equal layers that can be shortened, with their lengths.

    Args:
        model: Left as it is.
        example: A batch of inputs.
    """
    found: dict[str, int] = {}
    with evaluating(model):
        shape = model(example).shape
        for name, module in model.named_modules():
            if not isinstance(module, nn.Sequential | nn.ModuleList) or len(module) < 2:
                continue
            layers = list(module)
            shapes = [[p.shape for p in layer.parameters()] for layer in layers]
            alike = all(type(layer) is type(layers[0]) for layer in layers)
            if not alike or not shapes[0] or any(each != shapes[0] for each in shapes):
                continue
            owner = model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            try:
                owner._modules[leaf] = module[:1]
                if model(example).shape == shape:
                    found[name] = len(module)
            except Exception:  # of a model that needs all of its layers
                continue
            finally:
                owner._modules[leaf] = module
    return found


@torch.no_grad()
def sort_channels(model: nn.Module, group: ChannelGroup) -> None:
    """Order a group's channels by the size of their weights, the largest first, in place."""
    order = channel_sizes(model, group).argsort(descending=True, stable=True)
    tensors = tensors_of(model)
    for each in group.cut:
        tensor = tensors[each.tensor].detach()
        old, new = (e.flatten().to(tensor.device) for e in (each.entries[order], each.entries))
        tensor.index_copy_(each.dim, new, tensor.index_select(each.dim, old))


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the batch norms' means and variances of each sub-model, as it has others.

    Args:
        model: A model with sub-models.
        batches: Inputs; without any, the sub-models keep those of the full model.
    """
    nest, child = nest_of(model), getattr(model, CHILD)
    assert isinstance(child, SubModels)
    batches = list(batches)
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    for submodel in nest.nested.submodels[1:]:
        numbers = child.numbers(submodel)
        if numbers is None:
            continue
        plan = nest.plan(model, submodel)
        numbers.copy_(torch.cat([value for *_, value in statistics(model, plan)]))
        if not batches:
            continue
        with evaluating(model), active(model, submodel), _measuring(norms):
            sums = torch.zeros_like(numbers, dtype=torch.float64)
            for batch in batches:
                model(batch)
                own = statistics(model, plan._replace(entries={}))
                sums += torch.cat([value for *_, value in own])
        numbers.copy_(sums / len(batches))


@contextmanager
def _measuring(norms: Sequence[Any]) -> Iterator[None]:
    """Replace the running statistics by those of the last batch."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
