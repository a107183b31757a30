"""Row weights of all micro-batches, outputs and processes on one scale.

The training loss is L = Σ ρ_i nll_i = factor · mean over samples of Σ ω_i nll_i, and the Fisher
is the mean over samples of Σ ω_i J_iᵀ H_i J_i, with H_i of one row's density. Where ρ is known
(certain targets, or stated weights), ω = ρ · samples / factor, whatever the loss divides by. Where
only the rows that count are known, the loss is taken for a mean, or a sum, over these.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from smallfry.curvature import Observation
from smallfry.curvature.row_weights import RowWeights

if TYPE_CHECKING:
    from smallfry.optim.base import NaturalGradient


class Weighing(NamedTuple):
    """The rows of one output in a batch, over all micro-batches and processes."""

    weighted: bool  # some rows weigh less than others, or nothing
    certain: bool  # all targets are, or weights are stated: ρ is known
    scaled: bool  # but the gradients may have been those of a scaled loss
    size: float  # samples, by the mean weight of their rows that count
    rows: float  # rows, by their weights, over the rows that a sample has
    samples: float

    def counted(self, loss_scale: float | str) -> float:
        """Samples that a stated loss would be the mean over."""
        if not self.weighted or loss_scale == "sum":
            return self.samples
        return self.rows if loss_scale == "mean" else self.size


def weighings(
    optimizer: "NaturalGradient", observations: Sequence[Observation]
) -> dict[int, Weighing]:
    """How the rows of each output weigh; called in all processes alike."""
    count = len(observations[0].outputs) if observations else 0
    found = {}
    for index in range(count):
        terms = [0.0] * 6
        for seen in observations:
            one = seen.weights.get(index, RowWeights(None, None))
            weighted = one is None or one.values is not None or one.given
            soft = one is not None and one.unit is None
            scaled = optimizer.observer.rescaled and not (one is not None and one.given)
            size, rows = _counted(one, seen.size)
            each = [float(t) for t in (weighted, soft, scaled, size, rows, seen.size)]
            terms = [total + term for total, term in zip(terms, each, strict=True)]
        if optimizer.exchange.count > 1:
            terms = optimizer.exchange.sums(terms, optimizer.device)
        any_weighted, any_soft, any_scaled, *sums = terms
        found[index] = Weighing(bool(any_weighted), not any_soft, bool(any_scaled), *sums)
    return found


def weigh_rows(
    optimizer: "NaturalGradient", observations: Sequence[Observation], factor: float
) -> dict[int, Weighing]:
    """Give the rows of all micro-batches their weights in the batch's Fisher.

    Args:
        optimizer: The optimizer.
        observations: Of the current batch; called in all processes alike.
        factor: The training loss over the mean negative log-likelihood.
    """
    found = weighings(optimizer, observations)
    for seen in observations:
        for index, rows in found.items():
            one, share = seen.weights.get(index), 1.0
            if rows.weighted and rows.certain and not rows.scaled and one is not None:
                unit = one.unit or 0.0
                share = rows.samples * unit / (factor * optimizer.exchange.count)
            elif rows.weighted:
                share = rows.samples / max(rows.counted(optimizer.loss_scale), 1e-30)
            seen.shares[index] = share
        seen.grouping = seen.samples / seen.size
    return found


def _counted(one: RowWeights | None, samples: int) -> tuple[float, float]:
    """Samples by the mean weight of their rows, and rows by their weights over rows a sample."""
    if one is None:
        return 0.0, 0.0
    means = one.of_samples(samples)
    if one.values is None or means is None:
        return float(samples), float(samples)
    return float(means.sum()), float(one.values.double().mean()) * samples
