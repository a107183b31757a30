"""Parameter, memory and MAC counts of a model."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smallfry._torch import enable_onednn, is_onednn_enabled


class Cost(NamedTuple):
    """Cost of a model on one input."""

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
    with _counting(model) as count:
        model(input)
    return count()


def layer_macs(model: nn.Module, input: Tensor) -> dict[str, int]:
    """Count the multiply-accumulates of each module by its name; the model stays untouched.

    Args:
        model: Any module.
        input: Input of ``model``.

    Returns:
        Those of all calls, without those of modules inside; modules without any are left out. The
        model's own are under an empty name. The sum is that of ``macs``.

    Example:
        >>> import torch
        >>> from smallfry.costing import layer_macs
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> layer_macs(model, torch.zeros(2, 4))
        {'0': 24}
    """
    model = deepcopy(model)
    counts: Counter[str] = Counter()
    running = [""]  # names of the modules that are being called, the innermost last
    counted = 0

    def settle() -> None:
        nonlocal counted
        total = count()
        counts[running[-1]] += total - counted
        counted = total

    def counted_apart(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            settle()
            running.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                settle()
                running.pop()

        return call

    for name, module in model.named_modules():  # without hooks, on which some take another path
        module.forward = counted_apart(name, module.forward)
    with _counting(model) as count:
        model(input)
    return {name: found for name, found in counts.items() if found}


@contextmanager
def _counting(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yield a function of the multiply-accumulates so far of a model that may be changed."""
    model.eval().requires_grad_(False)  # FlopCounterMode stumbles over views of parameters
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _plain_kernels(model), counter:
        yield lambda: counter.get_total_flops() // 2


@contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Take the plain forms of attention and of recurrent layers; not all fused ones are counted."""
    onednn, fast = is_onednn_enabled(), torch.backends.mha.get_fastpath_enabled()
    recurs = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        enable_onednn(onednn and not recurs)
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        enable_onednn(onednn)
        torch.backends.mha.set_fastpath_enabled(fast)


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
