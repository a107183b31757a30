"""Row weights of all micro-batches, outputs and processes on one scale.

The training loss is L = Σ ρ_i nll_i = factor · mean over samples of Σ ω_i nll_i, and the Fisher
is the mean over samples of Σ ω_i J_iᵀ H_i J_i, with H_i of one row's density. Where ρ is known
(certain targets, or stated weights), ω = ρ · samples / factor, whatever the loss divides by. Where
only the rows that count are known, the loss is taken for a mean, or a sum, over these. ρ may be one
number within each micro-batch, and another in the next.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from smallfry.curvature import Observation
from smallfry.curvature.row_weights import EQUAL, RowWeights
from smallfry.optim.collectives import Collectives


class Weighing(NamedTuple):
    """Row weights of one output in a batch, over all micro-batches and processes."""

    weighted: bool  # some rows weigh less than others, or nothing
    within: bool  # so they do within some process
    certain: bool  # all targets are, or weights are stated: ρ is known
    scaled: bool  # but the gradients may have been those of a scaled loss
    size: float  # samples, by the mean weight of their rows that count
    rows: float  # rows, by their weights, over the rows that a sample has
    samples: float
    unit: float  # mean ρ of the samples, where it is known

    def counted(self, loss_scale: float | str) -> float:
        """Count the samples in the mean of the stated loss."""
        if not self.weighted or loss_scale == "sum":
            return self.samples
        return self.rows if loss_scale == "mean" else self.size


def weighings(
    observations: Sequence[Observation], rescaled: bool, collectives: Collectives
) -> dict[int, Weighing]:
    """Compute the row weights of each output; called in all processes alike.

    Args:
        observations: Observations of the current batch.
        rescaled: The gradients may be those of a loss that was scaled by an unknown number.
        collectives: Messages between processes.
    """
    count = len(observations[0].outputs) if observations else 0
    found = {}
    for index in range(count):
        terms = [0.0] * 9
        for seen in observations:
            one = seen.weights.get(index, RowWeights(None, None))
            weighted = one is None or one.values is not None or one.given
            soft = one is not None and one.unit is None
            scaled = rescaled and not (one is not None and one.given)
            size, rows = _counted(one, seen.size)
            unit = 0.0 if one is None or one.unit is None else one.unit
            moments = size * unit, size * unit**2, rows * unit
            each = [weighted, soft, scaled, size, rows, seen.size, *moments]
            terms = [total + float(term) for total, term in zip(terms, each, strict=True)]
        dtype = observations[0].outputs[index].dtype
        terms[0] += _weighing(terms, dtype).weighted
        terms = collectives.sums(terms)
        found[index] = _weighing(terms, dtype)
    return found


def _weighing(terms: Sequence[float], dtype: torch.dtype) -> Weighing:
    """Compute row weights from sums over micro-batches, or over those of all processes.

    Args:
        terms: Parts that have unequal weights, soft targets, a scaled loss; samples as counted;
            rows; samples; size · ρ, size · ρ², rows · ρ.
        dtype: Precision of the output, and of its gradients.
    """
    weighted, soft, scaled, size, rows, samples, mass, square, row_mass = terms
    if soft or not mass:
        known = bool(weighted), bool(weighted), not soft, bool(scaled)
        return Weighing(*known, size, rows, samples, 0.0)
    unit = mass / size
    # ρ may be one in each part, and differ between them
    spread = max(square / size - unit**2, 0.0) ** 0.5
    uneven = spread > max(EQUAL, torch.finfo(dtype).eps) * unit
    known = bool(weighted) or uneven, bool(weighted), True, bool(scaled)
    return Weighing(*known, size, row_mass / unit, samples, unit)


def weigh_rows(
    observations: Sequence[Observation],
    factor: float,
    loss_scale: float | str,
    rescaled: bool,
    collectives: Collectives,
) -> dict[int, Weighing]:
    """Set the row weights of all micro-batches in the batch's Fisher.

    Args:
        observations: Observations of the current batch; called in all processes alike.
        factor: The training loss over the mean negative log-likelihood.
        loss_scale: The same as it was stated.
        rescaled: The gradients may be those of a loss that was scaled by an unknown number.
        collectives: Messages between processes.
    """
    found = weighings(observations, rescaled, collectives)
    for seen in observations:
        for index, rows in found.items():
            one, share = seen.weights.get(index), 1.0
            if rows.weighted and rows.certain and not rows.scaled and one is not None:
                unit = one.unit or 0.0
                share = rows.samples * unit / (factor * collectives.count)
            elif rows.weighted:
                share = rows.samples / max(rows.counted(loss_scale), 1e-30)
                if rows.unit and one is not None:
                    share *= (one.unit or 0.0) / rows.unit
            seen.shares[index] = share
            seen.weighted[index] = rows.weighted
        seen.grouping = seen.samples / seen.size
    return found


def _counted(one: RowWeights | None, samples: int) -> tuple[float, float]:
    """Sum samples by the mean weight of their rows, and rows by weight over rows per sample."""
    if one is None:
        return 0.0, 0.0
    means = one.of_samples(samples)
    if one.values is None or means is None:
        return float(samples), float(samples)
    return float(means.sum()), float(one.values.double().mean()) * samples
