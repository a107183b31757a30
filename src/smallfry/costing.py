"""Parameter, memory and MAC counts of a model."""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """The cost of a model on one input."""

    parameters: int  # unique ones: a weight that is shared or used many times counts once
    bytes: int  # of parameters and buffers, in their own precision
    macs: int  # multiply-accumulates of matrix products, convolutions and attention, all calls
    activation_bytes: int  # that a training forward pass keeps for the backward pass


def cost(model: nn.Module, input: Tensor) -> Cost:
    """Measure a model on an input; the model, its buffers and random state stay untouched.

    Args:
        model: Any module; on the device "meta" nothing is computed, and large ones cost no time.
        input: Input of ``model``, such as ``torch.zeros(1, 3, 32, 32)``. ``macs`` and
            ``activation_bytes`` are those of the whole batch.

    Example:
        >>> import torch
        >>> from smallfry import cost
        >>> spent = cost(torch.nn.Linear(8, 4), torch.zeros(2, 8))
        >>> spent.parameters, spent.bytes, spent.macs
        (36, 144, 64)
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    with torch.random.fork_rng():
        return Cost(
            parameters=sum(p.numel() for p in model.parameters()),
            bytes=sum(t.numel() * t.element_size() for t in tensors),
            macs=macs(model, input),
            activation_bytes=_activation_bytes(deepcopy(model), input),
        )


def macs(model: nn.Module, input: Tensor) -> int:
    """Count the multiply-accumulates of all calls on an input; the model stays untouched."""
    model = deepcopy(model)
    model.eval().requires_grad_(False)  # FlopCounterMode stumbles over views of parameters
    counter = FlopCounterMode(display=False)
    # the plain form of attention: not every PyTorch counts the fused ones
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(input)
    return counter.get_total_flops() // 2


def _activation_bytes(model: nn.Module, input: Tensor) -> int:
    held = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    own = {id(storage) for storage in held}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their identities unique

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # one object for all tensors in it, on "meta" as well
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    model.train()
    twice = torch.cat([input, input])  # batch normalisation can't train on a single value
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(twice)
    return sum(storage.nbytes() for storage in kept.values()) // 2
