"""Construction of models from untrusted specs and weights.

Only architectures of timm's registry are made, with plain values as arguments; nothing is fetched,
no other file is read, and a description of more weights than come with it is not followed.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from smallfry.errors import RunError, nearest
from smallfry.io.plugins import load_kits
from smallfry.transforms.spec import ModelSpec
from smallfry.version import __version__

LARGEST = 1_000_000  # number in a model's arguments
MOST_MODULES = 100_000
SLACK = 4  # constructors make some layers more than once, and have buffers that are not saved
SPARE = 2**24  # numbers
MOST_SAVED = 50  # times that transforms make a model smaller
MOST_BEFORE = 2**29  # numbers before transforms, of a model that is small after them


def build(
    spec: ModelSpec,
    weights: Mapping[str, Tensor] | None = None,
    *,
    where: str = "model",
    **factory: Any,
) -> nn.Module:
    """Build a model, in evaluation mode on the CPU.

    Args:
        spec: Its identity.
        weights: Its weights, which also bound how large it can be; None leaves those of its
            initialisation, and the bound, away.
        where: Prefix of error messages.
        factory: Arguments of timm's factory that are not the spec's.

    Raises:
        RunError: An unknown architecture, arguments or transforms that it does not have, weights
            that don't fit or are not finite.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> type(build(ModelSpec("resnet18", {"num_classes": 10}))).__name__
        'ResNet'
    """
    name = spec.architecture
    if not is_model(name) or ":" in name:
        raise RunError(
            f"{where}: unknown architecture '{name}' for smallfry {__version__} and timm "
            f"{timm.__version__}{nearest(name, timm.list_models())}"
        )
    _require_plain(spec.arguments, where)
    try:
        with _bounded(_most(spec, weights)):
            model: nn.Module = timm.create_model(name, **factory, **spec.arguments)
            for transform in spec.transforms:
                transform.apply(model)
    except Exception as error:  # of any of timm's models, given any arguments
        reason = (str(error) or repr(error)).splitlines()[0]
        raise RunError(
            f"{where}: the model can't be built from its description: {reason}"
        ) from error
    if weights is not None:
        _fill(model, weights, where)
    return model.eval()


def is_model(name: str) -> bool:
    """Return whether an architecture is known, to timm's registry or to a kit."""
    if not timm.is_model(name):
        load_kits()
    return bool(timm.is_model(name))


def _fill(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(
            f"{where}: its weights don't fit its model ({' '.join(str(error).split())[:200]})"
        ) from error
    name = not_finite(model)
    if name is not None:
        raise RunError(f"{where}: the weight '{name}' is not finite; use another checkpoint")


def not_finite(model: nn.Module) -> str | None:
    """Find the first non-finite weight, or running statistic of a norm; None if all are finite."""
    running = [(n, b) for n, b in model.named_buffers() if ".running_" in f".{n}"]
    for name, tensor in (*model.named_parameters(), *running):
        if not bool(tensor.isfinite().all()):
            return name
    return None


def _require_plain(value: Any, where: str, depth: int = 0) -> None:
    if depth > 10:
        raise RunError(f"{where}: the model's arguments are nested too deeply")
    if isinstance(value, Mapping):
        for inner in value.values():
            _require_plain(inner, where, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_plain(inner, where, depth + 1)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:  # nan too
        raise RunError(f"{where}: {str(value)[:20]} is too large for an argument of a model")


class _Bound(NamedTuple):
    weights: int  # numbers that come with the model
    most: int  # numbers that it may have while it is made


def _most(spec: ModelSpec, weights: Mapping[str, Tensor] | None) -> _Bound | None:
    if weights is None:
        return None
    numbers = sum(weight.numel() for weight in weights.values())
    # before it is cut or factorised, a model is larger
    slack = SLACK * (MOST_SAVED if spec.transforms else 1)
    return _Bound(numbers, min(slack * numbers, max(SLACK * numbers, MOST_BEFORE)) + SPARE)


@contextmanager
def _bounded(bound: _Bound | None) -> Iterator[None]:
    """Abort the construction of a model once it is larger than its weights."""
    if bound is None:
        yield
        return
    numbers, most = bound
    thread, count, modules = threading.get_ident(), 0, 0

    def grow(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal count
        if tensor is not None and threading.get_ident() == thread:
            count += tensor.numel()
            if count > most:
                raise ValueError(f"it would be larger than its weights, which are {numbers:,}")

    def nest(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules += 1
            if modules > MOST_MODULES:
                raise ValueError(f"it would have more than {MOST_MODULES:,} layers")

    hooks = [
        register_module_parameter_registration_hook(grow),
        register_module_buffer_registration_hook(grow),
        register_module_module_registration_hook(nest),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
