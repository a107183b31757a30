"""Divergence of a step, measured by running the model twice on an observed batch."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from smallfry.curvature import Observation
from smallfry.errors import UsageError
from smallfry.optim import quadratic
from smallfry.optim.preconditioned import PreconditionedOptimizer

KEPT = 0.8  # of the old ratios, at most


def divergence(
    optimizer: PreconditionedOptimizer,
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    start: Mapping[str, Tensor] | None = None,
) -> float:
    """Compute KL(before ‖ after) of a step, mean over the samples of the whole batch.

    Rows count by their weights in the loss, so that padding does not. The model runs twice, as
    compiled code, which the caller's pass may have been, draws another dropout.

    Args:
        optimizer: The optimizer.
        observations: Of the current batch, with the arguments of the forward pass.
        step: What is added to the parameters after it, by their names.
        start: What is added to them before it; nothing by default.

    Raises:
        UsageError: The model, or the likelihood, can't be had again; in all processes alike.
    """
    total, samples, failed = 0.0, optimizer.batch_size(observations), ""
    if start is None:
        start = {name: torch.zeros_like(part) for name, part in step.items()}
    parameters = {name: p for p, name in optimizer.names.items()}
    for seen in observations:
        try:  # whatever a foreign forward does when it is called again
            with _autocast(seen):
                before, after = (
                    _precise(quadratic.run(optimizer.observer, seen, parameters, one, kernels=()))
                    for one in (start, step)
                )
            found = optimizer.likelihood.divergence(before, after, seen.row_shares)
            total += float(found.double().sum())
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
    if optimizer.collectives.any_process(bool(failed)):
        raise UsageError(f"the model can't run again on the same batch ({failed})")
    return optimizer.collectives.sums([total])[0] / samples


def require_unchanged(
    optimizer: PreconditionedOptimizer, observations: Sequence[Observation]
) -> None:
    """Require the arguments of an observed forward pass as they were, in all processes alike."""
    if optimizer.collectives.any_process(not all(seen.unchanged for seen in observations)):
        raise UsageError(
            "the model overwrites its arguments, or they were overwritten before step(); expected "
            "them as they were, to run it again on the same batch"
        )


def require_repeatable(found: float, promised: float) -> None:
    """Require that a model with fixed parameters hardly diverges from itself."""
    if not found <= promised / 10:
        raise UsageError(
            "the model gives other outputs when it runs again on the same batch; expected all its "
            "randomness to come from torch's generators, and no state to be carried over from "
            "call to call"
        )


def promised_divergence(optimizer: PreconditionedOptimizer) -> float:
    """Compute κ n / 2, the bound on the divergence of a step."""
    assert optimizer.kl_clip is not None
    return optimizer.kl_clip * optimizer.targets / 2


def averaged(optimizer: PreconditionedOptimizer, old: float, new: float) -> float:
    """Compute the running mean of measurements: of all so far at first."""
    kept = min(1 - 1 / max(1, optimizer.counters["measurements"]), KEPT)
    return kept * old + (1 - kept) * new


def clip_to(allowed: float, size: float) -> float:
    """Compute the scale at which a step of this size, a square, has the allowed one."""
    return 1.0 if size <= allowed else (allowed / size) ** 0.5


def _precise(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(z if z.dtype == torch.float64 else z.float() for z in outputs)


def _autocast(seen: Observation) -> AbstractContextManager[object]:
    """Restore the precision of the caller's forward pass."""
    if seen.autocast is None:
        return nullcontext()
    device, dtype = seen.autocast
    return torch.autocast(device, dtype)
