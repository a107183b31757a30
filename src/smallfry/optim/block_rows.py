"""Rows of a block in a batch: selection of uses, and balancing of weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from smallfry.curvature import Block, Observation, Rows
from smallfry.curvature.kronecker import reduced
from smallfry.errors import UsageError
from smallfry.optim.approximation import Approximation
from smallfry.optim.checks import warn
from smallfry.optim.numerics import statistics_dtype

ASTRAY = (
    "layer '{layer}': its rows are not in the order of the samples:"
    " one sample's output sends its gradient to rows of others, as with windows or tokens folded "
    "position first, routed rows, or layers that mix samples. Fold them sample by sample; or give "
    "sharing='expand', for all layers or as {{'{layer}': 'expand'}}, where the method has it "
    "(KFAC's default), or exclude=['{layer}']"
)
ANONYMOUS = (
    "layer '{layer}' was called on a number of rows that the {samples} samples of the "
    "network don't divide, as in a mixture of experts, and this method needs the sample of each "
    "row. Give sharing='expand', for all layers or as a mapping {{'{layer}': 'expand'}} (KFAC's "
    "default), which works without; or exclude=['{layer}']; or "
    "bring the samples into the first dimension"
)


def rows_of_batch(
    block: Block,
    observations: Sequence[Observation],
    method: Approximation,
    check: Literal["error", "warn", "off"],
    uses: Callable[[Observation, int], Tensor | None],
) -> list[Rows]:
    """Collect the rows of a block, one for each micro-batch in which it was called.

    Args:
        block: The block.
        observations: Observations of the micro-batches.
        method: Approximation of the block.
        check: What to do about rows that were found with other samples than by their place.
        uses: Which uses of a micro-batch to keep, given their number; None for all.

    Raises:
        UsageError: Rows belong to no sample, or to another, and the method depends on it.
    """
    found = list[Rows]()
    for seen in observations:
        if not method.sums_over_uses(block):
            _require_samples(block, seen, check)
        if method.counts_absence or any(call.block is block for call in seen.calls):
            numbered = method.takes_numbers(block)
            kept = None if numbered else partial(uses, seen)
            rows = rows_of(block, seen, kept, numbered)
            if rows.weights is not None and method.sharing_of(block) == "reduce":
                rows = reduced(rows)
            found.append(rows)
    return found


def _require_samples(block: Block, seen: Observation, check: str) -> None:
    stray = seen.anonymous(block)
    if stray is not None:
        raise UsageError(ANONYMOUS.format(layer=stray, samples=seen.samples))
    astray = seen.astray(block) if check != "off" else None
    if astray is not None and check == "error":
        raise UsageError(ASTRAY.format(layer=astray))
    if astray is not None:
        warn(ASTRAY.format(layer=astray))


def rows_of(
    block: Block,
    seen: Observation,
    uses: Callable[[int], Tensor | None] | None = None,
    numbered: bool = False,
) -> Rows:
    """Collect the rows of a block in one forward pass; zeros if it was not called.

    Args:
        block: The block.
        seen: One forward pass.
        uses: Uses to keep, as in ``Observation.rows``.
        numbered: One-hot inputs by their numbers, as there.
    """
    like = next(iter(block.parameters.values()))
    dtype = statistics_dtype(like.dtype)
    rows = seen.rows(block, dtype, uses, numbered)
    if rows is not None:
        return rows
    groups, outputs, inputs = block.shape
    zero = like.new_zeros((), dtype=dtype)
    a = (zero - 1 if numbered else zero).expand(groups, seen.samples, 1, 1 if numbered else inputs)
    return Rows(a, zero.expand(groups, len(seen.draws), seen.samples, 1, outputs))


def balanced(rows: Sequence[Rows], samples: float, mass: float) -> list[Rows]:
    """Scale row weights to mean 1 over all micro-batches and processes.

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
