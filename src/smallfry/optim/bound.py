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
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smallfry.curvature import Observation
from smallfry.errors import UsageError
from smallfry.optim import quadratic
from smallfry.optim.checks import warn

if TYPE_CHECKING:
    from smallfry.optim.base import NaturalGradient

KEPT = 0.8  # of the old ratios, at most
GROWTH = 2.0  # of ⟨v, m⟩ since the last measurement, at which the next one is due
TRIES = 8  # each shortens a step tenfold at most, until its divergence is nearly quadratic


def clip_step(
    optimizer: "NaturalGradient",
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    modelled: float,
    parameters: Mapping[str, nn.Parameter],
) -> float:
    """Compute the scale ν of a step, measured if due.

    Args:
        optimizer: The optimizer; what was measured becomes part of its state.
        observations: Of the current batch, with the arguments of the forward pass.
        step: Change of the parameters for ν = 1.
        modelled: Twice its divergence by ⟨v, m⟩.
        parameters: Parameters by name.
    """
    kappa = optimizer.kl_clip
    if kappa is None or not modelled > 0:
        return 1.0
    due = optimizer.measuring or modelled > GROWTH * optimizer.measured_size
    due = due and optimizer.measurable
    if not due or optimizer.collectives.any_process(not _kept(observations)):
        optimizer.measuring = due  # on the next step, which is then observed
        growth = modelled / (GROWTH * optimizer.measured_size) if optimizer.measured_size else 1.0
        ratio = optimizer.divergence_ratio * max(1.0, growth)
        return _clip(kappa * optimizer.targets, ratio * modelled)
    optimizer.measuring, optimizer.measured_size = False, modelled
    optimizer.count_targets(optimizer.weighed(observations))
    allowed, ratio = kappa * optimizer.targets, optimizer.divergence_ratio
    clip = _clip(allowed, ratio * modelled)
    try:
        found = _measure(optimizer, observations, step, parameters, modelled, clip)
    except UsageError as error:
        optimizer.measurable = False
        warn(f"steps are bounded by the model of their divergence alone: {error}")
        return clip
    if found is None:
        return clip
    if not math.isfinite(found):
        optimizer.measuring = True
        return 0.0  # however short a step is, it breaks the model
    count = optimizer.counters["measurements"] + 1
    kept = min(1 - 1 / count, KEPT)
    optimizer.counters["measurements"] = count
    optimizer.divergence_ratio = kept * ratio + (1 - kept) * max(found, 1.0)
    return _clip(allowed, max(found, optimizer.divergence_ratio) * modelled)


def divergence(
    optimizer: "NaturalGradient",
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> float:
    """Compute KL(before ‖ after) of a step, mean over the samples of the whole batch.

    Rows count by their weights in the loss, so that padding does not. The model runs twice, as
    compiled code, which the caller's pass may have been, draws another dropout.

    Raises:
        UsageError: The model, or the likelihood, can't be had again; in all processes alike.
    """
    total, samples, failed = 0.0, optimizer.batch_size(observations), ""
    idle = {name: torch.zeros_like(part) for name, part in step.items()}
    for seen in observations:
        try:  # whatever a foreign forward does when it is called again
            with _autocast(seen):
                before, after = (
                    _precise(quadratic.run(optimizer.observer, seen, parameters, one, kernels=()))
                    for one in (idle, step)
                )
            found = optimizer.likelihood.divergence(before, after, seen.row_shares)
            total += float(found.double().sum())
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
    if optimizer.collectives.any_process(bool(failed)):
        raise UsageError(f"the model can't run again on the same batch ({failed})")
    return optimizer.collectives.sums([total])[0] / samples


def _measure(
    optimizer: "NaturalGradient",
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    modelled: float,
    clip: float,
) -> float | None:
    """Compute twice the measured divergence over the modelled; None if a step is too short."""
    assert optimizer.kl_clip is not None
    promised = optimizer.kl_clip * optimizer.targets / 2
    if optimizer.collectives.any_process(not all(seen.unchanged for seen in observations)):
        raise UsageError(
            "the model overwrites its arguments, or they were overwritten before step(); expected "
            "them as they were, to run it again on the same batch"
        )
    found, asked = math.inf, clip
    for attempt in range(TRIES):
        shortened = {name: part * clip for name, part in step.items()}
        found = divergence(optimizer, observations, shortened, parameters)
        doubtful = not optimizer.counters["measurements"] or not found <= promised
        if attempt == 0 and doubtful:  # where a step seems too long, is it the step?
            idle = {name: torch.zeros_like(part) for name, part in step.items()}
            _require_repeatable(divergence(optimizer, observations, idle, parameters), promised)
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


def _require_repeatable(found: float, promised: float) -> None:
    """Require that a model with fixed parameters hardly diverges from itself."""
    if not found <= promised / 10:
        raise UsageError(
            "the model gives other outputs when it runs again on the same batch; expected all its "
            "randomness to come from torch's generators, and no state to be carried over from "
            "call to call"
        )


def _kept(observations: Sequence[Observation]) -> bool:
    return bool(observations) and all(seen.arguments or seen.keywords for seen in observations)


def _clip(allowed: float, size: float) -> float:
    return 1.0 if size <= allowed else (allowed / size) ** 0.5


def _precise(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(z if z.dtype == torch.float64 else z.float() for z in outputs)


def _autocast(seen: Observation) -> AbstractContextManager[object]:
    """Restore the precision of the caller's forward pass."""
    if seen.autocast is None:
        return nullcontext()
    device, dtype = seen.autocast
    return torch.autocast(device, dtype)
