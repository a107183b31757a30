"""Refreshing the curvature: from what was observed to statistics, damping and inverses."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smallfry.curvature import Block, Observation, Rows
from smallfry.curvature.kronecker import NotFiniteError, reduced
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim.approximation import State
from smallfry.optim.checks import check_layers, check_loss
from smallfry.optim.weighing import Weighing, weigh_rows

if TYPE_CHECKING:
    from smallfry.optim.base import NaturalGradient


def refresh(
    optimizer: "NaturalGradient",
    observations: Sequence[Observation],
    grads: Mapping[str, Tensor],
    factor: float,
) -> None:
    """Refresh what is due.

    Args:
        optimizer: The optimizer.
        observations: Of the current batch.
        grads: ``.grad`` of the covered parameters, by name.
        factor: The training loss over the mean negative log-likelihood.

    Raises:
        UsageError: No forward pass was ever seen, or what was seen is not what was stated.
    """
    statistics = optimizer.overdue or optimizer._due(optimizer.statistics_every)
    inverse = optimizer.overdue_inverse or optimizer._due(optimizer.inverse_every)
    foreign = [name for seen in observations for name in seen.foreign]
    if anywhere(optimizer, bool(foreign)) if statistics else foreign:
        raise UsageError(
            f"layer '{(foreign or ['of another process'])[0]}' has another weight than when the "
            "optimizer was built; build the optimizer after the model has its final layers"
        )
    tapped = [seen for seen in observations if seen.calls]
    if statistics and anywhere(optimizer, not tapped):
        _complain_unseen(optimizer)
        statistics = False
    if not statistics and not inverse:
        return
    if statistics:
        weighed = weigh_rows(optimizer, tapped, factor)
        _check(optimizer, tapped, grads, factor, weighed)
        for seen in tapped:
            seen.put_together()
    if statistics and optimizer.observer.fisher == "empirical":
        # processes average their gradients: a mean share of the samples is what one stands for
        mean_share = optimizer._batch_size(tapped) / optimizer.exchange.count
        optimizer.observer.use_training_gradients(tapped, mean_share / factor)
    drawn = not optimizer.approximation.needs_gradients or all(seen.draws for seen in tapped)
    if statistics and anywhere(optimizer, not (drawn and _tame(tapped))):
        optimizer.counters["failed_refreshes"] += 1
        optimizer.overdue, optimizer.overdue_inverse = True, optimizer.overdue_inverse or inverse
        return
    optimizer._refresh_blocks(tapped if statistics else [], inverse)
    if statistics:
        optimizer.overdue = False
    if inverse:
        optimizer.overdue_inverse = False


def nothing_to_do(optimizer: "NaturalGradient", observations: Sequence[Observation]) -> bool:
    """Whether a refresh is due, nothing was seen, and all gradients are zero.

    So it is for an empty batch, and where ``torch.distributed.checkpoint`` steps only to make an
    optimizer's state.
    """
    due = optimizer.overdue or optimizer._due(optimizer.statistics_every)
    if not due or anywhere(optimizer, bool(observations)):
        return False
    grads = [p.grad for p in optimizer.names if p.grad is not None]
    return not anywhere(optimizer, not grads or any(bool(g.any()) for g in grads))


def _check(
    optimizer: "NaturalGradient",
    tapped: Sequence[Observation],
    grads: Mapping[str, Tensor],
    factor: float,
    weighed: Mapping[int, Weighing],
) -> None:
    late = next((name for name, p in optimizer.frozen.items() if p.grad is not None), None)
    if late is not None:
        optimizer.frozen.pop(late)
        warn(
            f"parameter '{late}' was frozen when the optimizer was built, and has a gradient "
            "now: it is not trained; build the optimizer anew after unfreezing"
        )
    if optimizer.checked or optimizer.check == "off":
        return
    optimizer.checked, exchange, wrong = True, optimizer.exchange, None
    samples = optimizer._batch_size(tapped) / exchange.count
    try:
        rescaled = check_layers(optimizer.blocks, tapped, grads, exchange)
        if not any(rows.weighted and rows.certain for rows in weighed.values()):
            counted = [r.counted(optimizer.loss_scale) / r.samples for r in weighed.values()]
            check_loss(
                optimizer.likelihood, tapped, factor, rescaled, samples * min(counted, default=1.0)
            )
    except UsageError as error:
        wrong = error
    if wrong is not None and optimizer.check == "warn":
        warn(str(wrong))
    if anywhere(optimizer, wrong is not None) and optimizer.check == "error":
        optimizer.checked = False
        raise wrong or UsageError("in another process the loss is not what the optimizer was told")


def anywhere(optimizer: "NaturalGradient", holds: bool) -> bool:
    """Whether something holds in any of the processes."""
    if optimizer.exchange.count == 1:
        return holds
    return optimizer.exchange.sums([holds], optimizer.device)[0] > 0


def refresh_blocks(
    optimizer: "NaturalGradient", tapped: Sequence[Observation], inverse: bool
) -> None:
    """Statistics, damping, inverses, of all blocks."""
    method = optimizer.approximation
    keep = share_kept(optimizer)
    settling: dict[str, tuple[list[Rows], float]] = {}
    if optimizer._monitoring and tapped:
        optimizer._latest = {}
    for number, block in enumerate(optimizer.blocks):
        state, began = optimizer.curvature[block.name], time.perf_counter()
        rows = rows_seen(optimizer, number, tapped)
        rows = balanced(rows, sum(r.samples for r in rows), sum(r.mass for r in rows))
        if rows:
            share = keep if state else 0.0
            try:
                method.update(block, state, rows, share, optimizer.generator)
            except NotFiniteError as error:
                optimizer.counters["failed_refreshes"] += 1
                warn(f"layer '{next(iter(block.layers))}': {error}; the last statistics are kept")
                continue
            state["shape"] = list(block.shape)
            optimizer.milliseconds[block.name] = 1e3 * (time.perf_counter() - began)
            if method.settles:
                settling[block.name] = rows, share
            if optimizer._monitoring:
                optimizer._latest[block.name] = rows
    set_lambdas(optimizer, traces(optimizer))
    for block in optimizer.blocks:
        state, began = optimizer.curvature[block.name], time.perf_counter()
        if state and (inverse or "inverted" not in state):
            invert(optimizer, block, state)
        if block.name in settling:
            rows, share = settling.pop(block.name)
            moments = method.moments(block, state, rows, sum(part.samples for part in rows))
            if moments is not None:
                method.settle(state, moments, share)
        spent = 1e3 * (time.perf_counter() - began)
        optimizer.milliseconds[block.name] = optimizer.milliseconds.get(block.name, 0.0) + spent
    set_lambdas(optimizer, traces(optimizer))
    optimizer.counters["statistics"] += bool(tapped)
    optimizer.counters["inverses"] += inverse


def share_kept(optimizer: "NaturalGradient") -> float:
    """Share of the old statistics that a refresh keeps."""
    count = optimizer.counters["statistics"] + 1
    return min(1 - 1 / count, optimizer.ema_decay)


def invert(optimizer: "NaturalGradient", block: Block, state: State) -> None:
    """Make a block's inverse anew, or keep the last one with a warning."""
    layer = next(iter(block.layers))
    try:
        raised = optimizer.approximation.invert(block, state, optimizer.lambdas[block.name])
    except NotFiniteError as error:
        optimizer.counters["failed_refreshes"] += 1
        warn(f"layer '{layer}': {error}; the last inverse is kept")
        return
    state["inverted"] = True
    if raised > 1:
        warn(
            f"layer '{layer}': a matrix is nearly singular, its damping was raised "
            f"{raised:g} times to invert it; a larger damping= avoids that"
        )


def traces(optimizer: "NaturalGradient", only: int | None = None) -> dict[str, float]:
    """tr F̂ of all blocks that there is something known of, or of those of one process."""
    trace, found = optimizer.approximation.trace, {}
    for block in optimizer.blocks:
        state = optimizer.curvature[block.name]
        if state and only in (None, optimizer.owners[block.name]):
            found[block.name] = trace(block, state)
    return found


def set_lambdas(optimizer: "NaturalGradient", found: Mapping[str, float]) -> None:
    """Set λ of each block from the traces of all."""
    known = [block for block in optimizer.blocks if block.name in found]
    relative = optimizer.damping * optimizer.damping_factor
    mean = sum(found.values()) / max(1, sum(block.size for block in known))
    for block in known:
        unit = found[block.name] / block.size if optimizer.damping_per == "layer" else mean
        # without any curvature a step is none: gradients are zero too
        optimizer.lambdas[block.name] = max(relative * unit, 1e-30)


def rows_seen(
    optimizer: "NaturalGradient", number: int, observations: Sequence[Observation]
) -> list[Rows]:
    """What a block saw, one for each micro-batch in which it was called.

    Each block has random numbers of its own: it does not matter which process refreshes it.
    """
    block, found = optimizer.blocks[number], list[Rows]()
    optimizer._draw(1, number)
    for seen in observations:
        called = any(call.block is block for call in seen.calls)
        stray = seen.anonymous(block)
        if not optimizer.approximation.sums_over_uses(block):
            if stray is not None:
                raise UsageError(_ANONYMOUS.format(layer=stray, samples=seen.samples))
            astray = seen.astray(block) if optimizer.check != "off" else None
            if astray is not None and optimizer.check == "error":
                raise UsageError(_ASTRAY.format(layer=astray))
            if astray is not None:
                warn(_ASTRAY.format(layer=astray))
        if called or optimizer.approximation.counts_absence:
            numbered = optimizer.approximation.takes_numbers(block)
            uses = None if numbered else partial(_drawn, optimizer, block, seen)
            rows = rows_of(block, seen, uses, numbered)
            if rows.weights is not None and optimizer.approximation.sharing_of(block) == "reduce":
                rows = reduced(rows)
            found.append(rows)
    optimizer._draw(2, number)
    return found


def balanced(rows: Sequence[Rows], samples: float, mass: float) -> list[Rows]:
    """Rows whose weights are 1 on average over all micro-batches and processes.

    Args:
        rows: One for each micro-batch.
        samples: In all of them, of all processes.
        mass: Their ``Rows.mass``.
    """
    if mass == samples:
        return list(rows)
    scale = samples / max(mass, 1e-30)
    found = []
    for part in rows:
        weights = part.weights
        if weights is None:
            weights = part.inputs.new_ones(part.samples, part.uses)
        found.append(part._replace(weights=weights * scale))
    return found


def rows_of(
    block: Block,
    seen: Observation,
    uses: Callable[[int], Tensor | None] | None = None,
    numbered: bool = False,
) -> Rows:
    """What a block saw; zeros where it was not called.

    Args:
        block: The block.
        seen: One forward pass.
        uses: Which uses to keep, as in ``Observation.rows``.
        numbered: One-hot inputs by their numbers, as there.
    """
    like = next(iter(block.parameters.values()))
    dtype = wide(like.dtype)
    rows = seen.rows(block, dtype, uses, numbered)
    if rows is not None:
        return rows
    groups, outputs, inputs = block.shape
    zero = like.new_zeros((), dtype=dtype)
    a = (zero - 1 if numbered else zero).expand(groups, seen.samples, 1, 1 if numbered else inputs)
    return Rows(a, zero.expand(groups, len(seen.draws), seen.samples, 1, outputs))


def _drawn(
    optimizer: "NaturalGradient", block: Block, seen: Observation, uses: int
) -> Tensor | None:
    """Which uses to take statistics from, where there are more than needed."""
    samples = seen.samples * optimizer.exchange.count  # about, where shares are uneven
    enough = optimizer.max_rows is None or samples * uses <= optimizer.max_rows
    if optimizer.max_rows is None or enough or not optimizer.approximation.sums_over_uses(block):
        return None
    kept = max(1, optimizer.max_rows // samples)
    device = optimizer.generator.device
    return torch.randperm(uses, generator=optimizer.generator, device=device)[:kept].sort().values


_ASTRAY = (
    "layer '{layer}': the rows that it was called on belong to other samples than their place says:"
    " one sample's output sends its gradient to rows of others, as with windows or tokens folded "
    "position first, routed rows, or layers that mix samples. Fold them sample by sample; or give "
    "sharing='expand', for all layers or as {{'{layer}': 'expand'}}, where the method has it "
    "(KFAC's default), or exclude=['{layer}']"
)
_ANONYMOUS = (
    "layer '{layer}' was called on rows that are no multiple of the {samples} samples that the "
    "network saw, so that they belong to none by their place, as those of a mixture of experts; "
    "this method needs to know. Give sharing='expand', for all layers or as a mapping "
    "{{'{layer}': 'expand'}}, which does not (KFAC's default); or exclude=['{layer}']; or bring "
    "the samples into the first dimension"
)


def _complain_unseen(optimizer: "NaturalGradient") -> None:
    if optimizer.counters["statistics"] == 0:
        raise UsageError(
            "no training forward pass was seen, so there is no curvature to step with: call "
            "the model that the optimizer was given (model.train(), with gradients), or name "
            "the module that is called with forward=; give the compiled model if it is compiled"
        )
    optimizer.counters["missed_refreshes"] += 1
    optimizer.overdue = True
    if optimizer.counters["missed_refreshes"] == 1:
        warn("a refresh was due, but no training forward pass was seen; it waits for the next")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that statistics of such parameters have: float32 at least."""
    return dtype if dtype == torch.float64 else torch.float32


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of all tensors are finite."""
    found = list(tensors)
    if not found:
        return True
    norms = torch._foreach_norm(found)
    return bool(torch.stack([n.float() for n in norms]).isfinite().all())


def warn(message: str) -> None:
    """Warn of something that training survives."""
    warnings.warn(message, SmallfryWarning, stacklevel=3)


def _tame(observations: Sequence[Observation]) -> bool:
    """Whether inputs and gradients of all calls are finite."""
    tensors = [call.inputs for seen in observations for call in seen.calls]
    tensors += [g for seen in observations for draw in seen.draws for g in draw if g is not None]
    return finite(t for t in tensors if t.is_floating_point())
