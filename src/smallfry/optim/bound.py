"""Bound on a step's divergence: a model of it, corrected by measurement.

⟨v, m⟩ bounds the divergence that F̂ foretells. F̂ is of earlier batches, one block apart from the
other, and too small along the directions of samples that it has not seen: the real divergence is
often ten to a thousand times as large. So it is measured, on the first step and on each behind a
refresh, whose batch F̂ has not seen: the model runs once more on the same batch with the moved
parameters, and

    r = 2 KL(before ‖ after) / (lr² ν² ⟨v, m⟩)

is averaged. All steps are then clipped by ν = min(1, √(κ n / (r̄ lr² ⟨v, m⟩))), n targets to a
sample: the mean divergence of steps is κ/2 for each target. A step that is measured also keeps to
its own r. ``r̄`` is at least 1: a step is never longer than without measurement.

Where ⟨v, m⟩ is far more than at the last measurement, the step is as much shorter, and the gradient
leaves momentum again.

With batch norm the last step is measured instead, on the batch at hand: ``optim/hindsight.py``.

The AdamW inside has no model. Its step is measured on the same batch, once the natural gradient's
is made: 2 KL = a lr², averaged into ā. Its rate is lowered until ā lr² is at most half of κ n, and
the natural gradient has what is left of κ n.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.curvature import Observation
from smallfry.errors import UsageError
from smallfry.optim.checks import warn
from smallfry.optim.hindsight import keep_fallback, measure_last_step
from smallfry.optim.measured import (
    averaged,
    clip_to,
    divergence,
    promised_divergence,
    require_repeatable,
    require_unchanged,
)
from smallfry.optim.preconditioned import PreconditionedOptimizer

GROWTH = 2.0  # of ⟨v, m⟩ since the last measurement, at which the next one is due
SHARE = 0.5  # of the promised divergence, at most, for what the AdamW inside moves
TRIES = 8  # each shortens a step tenfold at most, until its divergence is nearly quadratic


def clip_step(
    optimizer: PreconditionedOptimizer,
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    modelled: float,
) -> float:
    """Compute the scale ν of a step, measured if due.

    Args:
        optimizer: The optimizer; what was measured becomes part of its state.
        observations: Of the current batch, with the arguments of the forward pass.
        step: Change of the parameters for ν = 1.
        modelled: Twice its divergence by ⟨v, m⟩.
    """
    kappa, optimizer.measured = optimizer.kl_clip, False
    if kappa is None or not modelled > 0:
        return 1.0
    due = optimizer.measuring or modelled > GROWTH * optimizer.measured_size
    due = due and optimizer.measurable
    if not due or optimizer.collectives.any_process(not _kept(observations)):
        optimizer.measuring = due  # on the next step, which is then observed
        ratio = optimizer.divergence_ratio * _growth(optimizer, modelled)
        return clip_to(_left(optimizer), ratio * modelled)
    optimizer.measuring, known = False, math.inf
    optimizer.count_targets(optimizer.weighed(observations))
    try:
        if optimizer.last_step is not None:
            known = measure_last_step(optimizer, observations, optimizer.last_step)
        if not math.isfinite(known):
            return _clip_by_own_batch(optimizer, observations, step, modelled)
    except UsageError as error:
        _give_up(optimizer, error)
        return clip_to(_left(optimizer), optimizer.divergence_ratio * modelled)
    optimizer.measuring = modelled > GROWTH * optimizer.measured_size
    return clip_to(_left(optimizer), known * _growth(optimizer, modelled) * modelled)


def _clip_by_own_batch(
    optimizer: PreconditionedOptimizer,
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    modelled: float,
) -> float:
    """Compute the scale of a step by its measurement on the current batch."""
    allowed, ratio = _left(optimizer), optimizer.divergence_ratio
    optimizer.measured_size, clip = modelled, clip_to(allowed, ratio * modelled)
    found = _measure(optimizer, observations, step, modelled, clip)
    optimizer.measured = True
    if found is None:
        return clip
    if not math.isfinite(found):
        optimizer.measuring = True
        return 0.0  # however short a step is, it breaks the model
    optimizer.counters["measurements"] += 1
    optimizer.divergence_ratio = averaged(optimizer, ratio, max(found, 1.0))
    return clip_to(allowed, max(found, optimizer.divergence_ratio) * modelled)


def step_fallback(optimizer: PreconditionedOptimizer, observations: Sequence[Observation]) -> None:
    """Step the inner AdamW, bounded by its share of the divergence.

    Args:
        optimizer: The optimizer, whose natural-gradient step is made; what was measured becomes
            part of its state.
        observations: Of the current batch.
    """
    adamw = optimizer.adamw
    if adamw is None:
        return
    scale = fallback_size(optimizer).scale
    rates = [group["lr"] for group in adamw.param_groups]
    rate = scale * max(float(one) for one in rates)
    moved = {optimizer.names[p]: p for g in adamw.param_groups for p in g["params"]}
    watched = optimizer.measured or optimizer.last_step is not None
    moved = {name: p for name, p in moved.items() if p.grad is not None and watched}
    old = {name: p.detach().clone() for name, p in moved.items()}
    for group in adamw.param_groups if scale < 1 else ():
        group["lr"] = group["lr"] * scale
    adamw.step()
    for group, one in zip(adamw.param_groups, rates, strict=True):
        group["lr"] = one
    if not moved or not rate > 0:
        return
    back, kept = {name: old[name] - p.detach() for name, p in moved.items()}, 1.0
    if optimizer.measured:
        try:
            kept = _measure_fallback(optimizer, observations, back, rate)
        except UsageError as error:
            _give_up(optimizer, error)
            return
    for name, p in moved.items() if kept < 1 else ():
        p.copy_(old[name]).sub_(back[name], alpha=kept)
    keep_fallback(optimizer, {name: -kept * part for name, part in back.items()}, kept * rate)


def _measure_fallback(
    optimizer: PreconditionedOptimizer,
    observations: Sequence[Observation],
    back: Mapping[str, Tensor],
    rate: float,
) -> float:
    """Compute the admissible part of a step of the inner AdamW, and average its divergence in.

    Args:
        optimizer: The optimizer.
        observations: Of the current batch.
        back: From the parameters as they are to those before the step.
        rate: The learning rate.
    """
    promised, found, kept = SHARE * promised_divergence(optimizer), math.inf, 1.0
    for attempt in range(TRIES):
        less = {name: (1 - kept) * part for name, part in back.items()}
        found = divergence(optimizer, observations, less, start=back)
        if attempt == 0 and not found <= promised:
            again = divergence(optimizer, observations, back, start=back)
            require_repeatable(again, promised)
        if found <= 4 * promised:
            break
        kept *= max((promised / found) ** 0.5, 0.1) if math.isfinite(found) else 0.1
    if not math.isfinite(found):
        return 0.0
    ratio, found = optimizer.fallback_ratio, 2 * found / (kept * rate) ** 2
    optimizer.fallback_ratio = averaged(optimizer, ratio, found) if ratio else found
    return kept * clip_to(2 * promised, found * (kept * rate) ** 2)


class FallbackSize(NamedTuple):
    """Scale and share of the inner AdamW on the next step."""

    scale: float  # factor on its rate
    size: float  # twice the divergence that is expected


def fallback_size(optimizer: PreconditionedOptimizer) -> FallbackSize:
    """Estimate the rate and the divergence of the inner AdamW from its last steps."""
    if optimizer.adamw is None or optimizer.kl_clip is None or not optimizer.measurable:
        return FallbackSize(1.0, 0.0)
    if not optimizer.fallback_ratio:  # the first step leaves room for whatever it will be
        first = not optimizer.counters["measurements"]
        return FallbackSize(1.0, 2 * SHARE * promised_divergence(optimizer) if first else 0.0)
    rate = max(float(group["lr"]) for group in optimizer.adamw.param_groups)
    size = optimizer.fallback_ratio * rate**2
    scale = clip_to(2 * SHARE * promised_divergence(optimizer), size)
    return FallbackSize(scale, scale**2 * size)


def fallback_share(optimizer: PreconditionedOptimizer) -> float:
    """Estimate the part of the inner AdamW in the promised divergence."""
    size = fallback_size(optimizer).size
    return size / (2 * promised_divergence(optimizer)) if size else 0.0


def _measure(
    optimizer: PreconditionedOptimizer,
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    modelled: float,
    clip: float,
) -> float | None:
    """Compute twice the measured divergence over the modelled; None if a step is too short."""
    require_unchanged(optimizer, observations)
    promised = promised_divergence(optimizer)
    found, asked = math.inf, clip
    for attempt in range(TRIES):
        shortened = {name: part * clip for name, part in step.items()}
        found = divergence(optimizer, observations, shortened)
        doubtful = not optimizer.counters["measurements"] or not found <= promised
        if attempt == 0 and doubtful:  # where a step seems too long, is it the step?
            idle = {name: torch.zeros_like(part) for name, part in step.items()}
            require_repeatable(divergence(optimizer, observations, idle), promised)
        if found <= 4 * promised:
            break
        # far out a divergence may grow faster than a square, or slower: look again nearer by
        clip *= max((promised / found) ** 0.5, 0.1) if math.isfinite(found) else 0.1
    if clip == 1.0 and found < promised / 100:
        return None
    ratio = 2 * found / (clip**2 * modelled)
    if clip < asked:  # longer ones were tried, and were too long
        ratio = max(ratio, 2 * promised / (clip**2 * modelled))
    return ratio


def _kept(observations: Sequence[Observation]) -> bool:
    return bool(observations) and all(seen.arguments or seen.keywords for seen in observations)


def _give_up(optimizer: PreconditionedOptimizer, error: UsageError) -> None:
    optimizer.measurable = False
    warn(f"steps are bounded by the model of their divergence alone: {error}")


def _growth(optimizer: PreconditionedOptimizer, modelled: float) -> float:
    """Divide momentum by ⟨v, m⟩ over the measured bound, at least 1, and return the divisor.

    Without this, a gradient outside the range of F̂ would act for as long as momentum lasts, while
    the batches it is measured on may not show its effect.
    """
    known = GROWTH * optimizer.measured_size
    if not known or modelled <= known:
        return 1.0
    for state in optimizer.state.values():
        if "momentum" in state:
            state["momentum"].div_(modelled / known)
    return modelled / known


def _left(optimizer: PreconditionedOptimizer) -> float:
    """Compute κ n less the part of the inner AdamW."""
    return 2 * promised_divergence(optimizer) - fallback_size(optimizer).size
