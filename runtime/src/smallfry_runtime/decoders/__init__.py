"""Decoders of outputs to values for JSON, one module per task, without PyTorch.

A module is named after its task, with ``_`` for ``-``, and has

    decode(outputs, classes, settings)
                                values for JSON of outputs (samples, …), given the classes' names
    right(outputs, labels)      for recursive models, which are calibrated with it: (samples,)
    read(text, classes, side)   for tasks whose inputs are text: pixels (samples, 1, side, side)
    VIEWS                       2 for tasks whose inputs are pairs of pictures

A kit's decoder is here, too, so that a device that runs its exports needs nothing else.
"""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import UsageError

__all__ = ["chosen_settings", "classified", "decoder_of", "has_decoder", "require_no_settings"]

Chosen = TypeVar("Chosen")


@cache
def _names() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(__path__))


def has_decoder(task: str) -> bool:
    """Return whether outputs of a task can be decoded."""
    return task.replace("-", "_") in _names()


def decoder_of(task: str) -> ModuleType:
    """Import the decoder of a task.

    Raises:
        UsageError: There is none in this version.
    """
    if not has_decoder(task):
        known = ", ".join(sorted(_names())).replace("_", "-")
        raise UsageError(f"no decoder for the task '{task[:40]}'; there are {known}")
    return import_module(f"{__name__}.{task.replace('-', '_')}")


def require_no_settings(settings: Mapping[str, Any] | None) -> None:
    """Refuse settings of a decoder that has none.

    Raises:
        UsageError: There are some.
    """
    if settings:
        raise UsageError(f"decoding has no setting '{next(iter(settings))}' here: leave it out")


def chosen_settings(kind: Callable[..., Chosen], settings: Mapping[str, Any] | None) -> Chosen:
    """Make a decoder's dataclass of settings from those given.

    Raises:
        UsageError: A setting that is not there, or one of another form.
    """
    known = [each.name for each in fields(cast(Any, kind))]
    for name in settings or ():
        if name not in known:
            raise UsageError(
                f"decoding has the settings {', '.join(known[:-1])} and {known[-1]}, not "
                f"'{str(name)[:40]}'"
            )
    return kind(**(settings or {}))


def classified(outputs: NDArray[Any], classes: Sequence[str], name: str) -> list[Any]:
    """Decode logits (samples, classes) to the likeliest class, as ``name``, and all probabilities.

    Example:
        >>> classified(np.zeros((1, 2)), ["no", "yes"], "answer")
        [{'answer': 'no', 'probabilities': {'no': 0.5, 'yes': 0.5}}]
    """
    logits = np.asarray(outputs, np.float64)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return [
        {
            name: classes[int(row.argmax())],
            "probabilities": dict(zip(classes, row.tolist(), strict=True)),
        }
        for row in shares
    ]
