"""Measurement of a step on the batch behind it, for models with batch norm.

A batch norm divides a batch by statistics of its own, which a step along this batch's gradient
moves far more than those of another batch: with few values in a channel the divergence on the own
batch is tens of times that on others, and steps bounded by it hardly move the model. The last
step is therefore measured on the first batch whose gradient is no part of it, the next one. Its
measurement bounds later steps, not itself. Only the first step has none behind it, and is measured
on its own batch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from smallfry.curvature import Observation
from smallfry.curvature.identity import mixes_samples
from smallfry.optim.measured import (
    averaged,
    divergence,
    promised_divergence,
    require_repeatable,
    require_unchanged,
)
from smallfry.optim.preconditioned import PreconditionedOptimizer
from smallfry.optim.preconditioner import copied


class LastStep(NamedTuple):
    """Step that the next batch measures."""

    covered: dict[str, Tensor]  # change by natural gradient, by parameter name
    fallback: dict[str, Tensor]  # change by the AdamW inside
    modelled: float  # twice its divergence by ⟨v, m⟩ for ν = 1
    clip: float  # ν
    rate: float  # of the AdamW inside
    own: bool  # measured on its own batch, too


def keep_step(
    optimizer: PreconditionedOptimizer, step: dict[str, Tensor], modelled: float, clip: float
) -> None:
    """Keep a step for the next batch to measure, if a batch norm mixes the samples of this one.

    Args:
        optimizer: The optimizer.
        step: Change of the covered parameters by name; kept, not copied.
        modelled: Twice its divergence by ⟨v, m⟩ for ν = 1.
        clip: ν.
    """
    wanted = optimizer.kl_clip is not None and optimizer.measurable and clip**2 * modelled > 0
    optimizer.last_step = None
    if wanted and mixes_samples(optimizer.observer.root):
        optimizer.last_step = LastStep(step, {}, modelled, clip, 0.0, optimizer.measured)


def keep_fallback(
    optimizer: PreconditionedOptimizer, change: dict[str, Tensor], rate: float
) -> None:
    """Add what the AdamW inside has moved, at a learning rate, to the step that is kept."""
    if optimizer.last_step is not None:
        optimizer.last_step = optimizer.last_step._replace(fallback=change, rate=rate)


def measure_last_step(
    optimizer: PreconditionedOptimizer, observations: Sequence[Observation], last: LastStep
) -> float:
    """Measure the last step on the current batch, and average its ratios in.

    Args:
        optimizer: The optimizer, whose parameters the step has moved.
        observations: Of the current batch, with the arguments of the forward pass.
        last: The last step.

    Returns:
        Twice the measured divergence over the modelled, at least 1; the average if the step was too
        short for a measurement; infinite if it broke the model.

    Raises:
        UsageError: The model can't run again on the batch.
    """
    require_unchanged(optimizer, observations)
    promised = promised_divergence(optimizer)
    fallback = {name: -change for name, change in last.fallback.items()}
    both = {name: -change for name, change in last.covered.items()} | fallback

    def diverged(start: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> float:
        return divergence(optimizer, observations, step, start)

    found, beside = diverged(both, fallback), 0.0
    if not found <= promised:
        require_repeatable(diverged({}, {}), promised)
    if fallback and last.rate > 0:
        beside = diverged(fallback, {})
    if not math.isfinite(found + beside):
        return math.inf
    optimizer.counters["measurements"] += 1
    if beside:
        size, old = 2 * beside / last.rate**2, optimizer.fallback_ratio
        optimizer.fallback_ratio = size if last.own or not old else averaged(optimizer, old, size)
    optimizer.measured_size = last.modelled
    if last.clip == 1.0 and found < promised / 100:
        return optimizer.divergence_ratio
    ratio = max(1.0, 2 * found / (last.clip**2 * last.modelled))
    old = optimizer.divergence_ratio
    optimizer.divergence_ratio = ratio if last.own else averaged(optimizer, old, ratio)
    return max(ratio, optimizer.divergence_ratio)


def save_last_step(optimizer: PreconditionedOptimizer) -> dict[str, Any]:
    """Return the step to measure as plain data, empty if there is none."""
    return optimizer.last_step._asdict() if optimizer.last_step is not None else {}


def load_last_step(optimizer: PreconditionedOptimizer, given: Mapping[str, Any]) -> None:
    """Load what ``save_last_step`` returned."""
    devices = {name: p.device for p, name in optimizer.names.items()}
    parts = {
        part: {name: copied(change, devices[name]) for name, change in given[part].items()}
        for part in ("covered", "fallback")
        if given
    }
    optimizer.last_step = LastStep(**{**given, **parts}) if given else None
