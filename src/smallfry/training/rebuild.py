"""A model made again as a file describes it, which may come from anyone.

Only architectures of timm's registry are made, with plain values as arguments; nothing is fetched,
no other file is read, and a description of more weights than come with it is not followed.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from smallfry.errors import RunError, nearest
from smallfry.version import __version__

# arguments of timm's factory that say where weights come from, or how layers are compiled
OF_THE_FACTORY = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"),
        *("cache_dir", "checkpoint_path", "scriptable", "exportable", "no_jit", "device", "dtype"),
    }
)
LARGEST = 1_000_000  # number in a model's arguments
MOST_MODULES = 100_000
SLACK = 4  # constructors make some layers more than once, and have buffers that are not saved
SPARE = 2**24  # numbers


def rebuild(
    name: str,
    arguments: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    where: str,
    **factory: Any,
) -> nn.Module:
    """The model, in evaluation mode, without the weights yet.

    Args:
        name: Of timm's registry.
        arguments: What it is created with.
        weights: What comes with it, which bounds how large it can be.
        where: What errors name.
        factory: What else timm's factory is told, by us.

    Raises:
        RunError: An unknown name, arguments that can't be meant, or a model that does not fit
            its weights.
    """
    if not isinstance(name, str) or not timm.is_model(name) or ":" in name:
        raise RunError(
            f"{where}: neither smallfry {__version__} nor timm {timm.__version__} has an "
            f"architecture '{name}'{nearest(str(name), timm.list_models())}"
        )
    _require_plain(arguments, where)
    try:
        with _bounded(sum(weight.numel() for weight in weights.values())):
            model: nn.Module = timm.create_model(name, **factory, **arguments)
    except Exception as error:  # of any of timm's models, given any arguments
        reason = (str(error) or repr(error)).splitlines()[0]
        raise RunError(f"{where}: the model can't be built as it is described: {reason}") from error
    return model.eval()


def fill(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Give a model its weights.

    Raises:
        RuntimeError: They don't fit it.
        RunError: One is not a finite number, so that every answer would be none.
    """
    model.load_state_dict(weights)
    name = not_finite(model)
    if name is not None:
        raise RunError(f"{where}: the weight '{name}' is not finite; take another checkpoint")


def not_finite(model: nn.Module) -> str | None:
    """The first weight, or running statistic of a norm, that is not finite; None if all are."""
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


@contextmanager
def _bounded(numbers: int) -> Iterator[None]:
    """Stop a model that this thread makes once it is larger than its weights."""
    most = SLACK * numbers + SPARE
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
