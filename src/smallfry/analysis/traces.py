"""Traces of a forward pass without computation: operators, shapes of outputs, allocated bytes."""

import copy
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smallfry._torch import TorchDispatchMode, aliases_of, storage_key
from smallfry.errors import UsageError

__all__ = ["Operation", "find_period", "trace_model"]

SIMILAR = 0.9  # share of operators that agree with those a period later


class Operation(NamedTuple):
    """Operator of a forward pass, as an observer sees it.

    Attributes:
        name: Such as ``add``; of convolutions ``pointwise``, ``depthwise``, ``grouped``, or
            ``convolution`` for the others.
        shape: Of its first output.
        allocated: Bytes of activations after it.
    """

    name: str
    shape: tuple[int, ...]
    allocated: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record of the operators that compute values; views are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.allocated = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        first = outputs[0] if isinstance(outputs, tuple | list) else outputs
        aliases = aliases_of(func)
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if is_view or not isinstance(first, Tensor):
            return outputs
        if all(alias is None for alias in aliases):
            for each in outputs if isinstance(outputs, tuple | list) else [outputs]:
                if isinstance(each, Tensor):
                    self._allocate(each)
        name = func.overloadpacket.__name__.rstrip("_").lstrip("_")
        if name == "convolution":
            name = _kind_of_convolution(args[0], args[1])
        self.operations.append(Operation(name, tuple(first.shape), self.allocated))
        return outputs

    def _allocate(self, tensor: Tensor) -> None:
        """Count the bytes of a tensor until nothing refers to its storage."""
        storage = tensor.untyped_storage()
        key, size = storage_key(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.allocated += size

        def release() -> None:
            self._known.discard(key)
            self.allocated -= size

        weakref.finalize(storage, release)


def _kind_of_convolution(inputs: Tensor, weight: Tensor) -> str:
    """Name a convolution as libraries do, which have kernels of their own for these."""
    groups = inputs.shape[1] // weight.shape[1]
    if groups > 1:
        return "depthwise" if weight.shape[1] == 1 else "grouped"
    return "pointwise" if weight[0, 0].numel() == 1 else "convolution"


@torch.no_grad()
def trace_model(model: nn.Module, shape: Sequence[int]) -> list[Operation]:
    """Trace a forward pass of one image on the device "meta", which computes nothing.

    Args:
        model: Taken in evaluation mode; it is copied.
        shape: Channels, height and width of the image.

    Raises:
        UsageError: The model's control flow depends on values, or it takes no such image.

    Example:
        >>> from torch import nn
        >>> [each.name for each in trace_model(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), [2])]
        ['addmm', 'relu']
    """
    floating = (each.dtype for each in model.parameters() if each.is_floating_point())
    image = torch.empty(1, *shape, dtype=next(floating, torch.float32), device="meta")
    recorder = _Recorder()
    try:
        twin = copy.deepcopy(model).to("meta").eval()
        with recorder:
            twin(image)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UsageError(
            f"{type(model).__name__} can't be traced without values: {error}"
        ) from error
    return recorder.operations


def find_period(names: Sequence[str]) -> tuple[int, int]:
    """Find the shortest period of a sequence of operators, and how often it is repeated.

    A period is a distance at which most operators of a stretch of two periods or more agree.

    Returns:
        Operators of a period and repetitions; 0 and 1 without a period.

    Example:
        >>> find_period(["conv", *["linear", "gelu", "add"] * 4, "linear"])
        (3, 4)
    """
    best = (0, 1)
    for lag in range(1, len(names) // 2 + 1):
        same = [a == b for a, b in zip(names, names[lag:], strict=False)]
        longest, run, misses = 0, 0, 0
        for agrees in same:
            run, misses = run + 1, misses + (not agrees)
            if misses > (1 - SIMILAR) * run:
                run, misses = 0, 0
            longest = max(longest, run)
        repeats = longest // lag + 1
        if repeats * lag > best[0] * best[1] * 1.2 and repeats > 1:
            best = (lag, repeats)
    return best
