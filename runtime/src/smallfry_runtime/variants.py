"""Sub-models of an export, and the choice of one within a budget of time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from smallfry_runtime.errors import UsageError
from smallfry_runtime.values import is_number

FOLDER = "submodels"  # of an export; each sub-model is an export in it
FULL = ""  # place of the full model, which is the export itself
MOST = 1000


class Variant(NamedTuple):
    """Sub-model with its figures, measured when it was exported."""

    name: str  # its size in words
    place: str  # name of its folder; "" of the full model
    ms: float  # median latency of one image on one thread, from pixels to probabilities
    accuracy: float  # on the validation images
    macs: int  # multiply-accumulates for one image


def best_within(variants: Sequence[Variant], ms: float) -> Variant:
    """Choose the most accurate sub-model within a budget of milliseconds, the fastest of equals.

    Raises:
        UsageError: No sub-models, or none that is as fast.
    """
    if not variants:
        raise UsageError(
            "this export has no sub-models; train with --methods '[sorted_net]' and export with "
            "--submodels N"
        )
    fast = [each for each in variants if each.ms <= ms]
    if not fast:
        least = min(variants, key=lambda each: each.ms)
        raise UsageError(
            f"budget_ms {ms:g} is met by no sub-model: the fastest, {least.name}, took "
            f"{least.ms:.3g} ms when it was exported"
        )
    return max(fast, key=lambda each: (each.accuracy, -each.ms))


def read_variants(content: Any) -> tuple[Variant, ...]:
    """Read the sub-models of a manifest.

    Raises:
        TypeError: Damaged, or a place that is no plain name.
    """
    if not isinstance(content, list) or len(content) > MOST:
        raise TypeError("submodels is not a list, or too long")
    variants = tuple(Variant(**each) for each in content)
    places = [each.place for each in variants]
    if len({*places}) != len(places):
        raise TypeError("submodels share a place")
    for each in variants:
        numbers = (each.ms, each.accuracy, each.macs)
        if not all(is_number(n) and n >= 0 for n in numbers):
            raise TypeError("a figure of a sub-model is not a number")
        if not isinstance(each.name, str) or not isinstance(each.place, str):
            raise TypeError("a sub-model has no name or place")
        if each.place != FULL and not (each.place.isascii() and each.place.isdigit()):
            raise TypeError(f"a sub-model is at {each.place[:40]!r}")
    return variants
