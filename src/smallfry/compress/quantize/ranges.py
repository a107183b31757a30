"""Ranges of activations from calibration, by additive statistics over batches and processes.

A first pass finds the extremes, a second one a histogram of 4,096 bins between −m and m, m the
largest magnitude. From it come, for b bits,

    min-max      the extremes
    percentile   the quantiles (100 − p) / 2 and p + (100 − p) / 2 percent
    MSE          of k/100 of the extremes, k = 1 … 100, the range of least squared error
    KL           [−t, t] cut to the extremes, t of the least divergence after Migacz's calibration
                 for 8 bits (TensorRT): 2,048 bins of |x|, merged into 128
"""

from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from smallfry.errors import UsageError
from smallfry.layers.quantizers import CANDIDATES, affine, round_affine

BINS = 4096
LEVELS = 128  # spans that KL merges bins into
TINY = 1e-4  # added to empty bins in KL

Range = Literal["minmax", "percentile", "mse", "kl"]
RANGES: tuple[Range, ...] = ("minmax", "percentile", "mse", "kl")


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


class Histogram(NamedTuple):
    """Counts of numbers in even bins between −``largest`` and ``largest``."""

    largest: float
    counts: Tensor  # (bins,), float64
    low: float = 0.0  # smallest number seen
    high: float = 0.0  # largest

    @classmethod
    def empty(cls, low: float, high: float) -> Self:
        """Create a histogram for numbers between two extremes."""
        return cls(max(-low, high, 0.0), torch.zeros(BINS, dtype=torch.float64), low, high)

    def add(self, values: Tensor) -> None:
        """Count numbers; those outside go to the outermost bins."""
        flat = values.detach().flatten()
        if not self.largest:
            self.counts[BINS // 2] += flat.numel()
            return
        position = (flat.double() + self.largest) * (BINS / (2 * self.largest))
        bins = position.long().clamp(0, BINS - 1).cpu()
        self.counts.add_(torch.bincount(bins, minlength=BINS).double())

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2 * self.largest / BINS

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, (bins,)."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width - self.largest

    @property
    def magnitudes(self) -> Tensor:
        """Counts of |x| in bins from 0, (bins / 2,)."""
        half = BINS // 2
        return self.counts[half:] + self.counts[:half].flip(0)


def find_range(seen: Histogram, kind: Range, bits: int, percent: float = 99.99) -> Interval:
    """Choose a range for the numbers of a histogram.

    Args:
        seen: Their histogram.
        kind: ``minmax``, ``percentile``, ``mse`` or ``kl``.
        bits: Bits of the quantiser.
        percent: Share of the numbers inside, for ``percentile``.

    Raises:
        UsageError: Another kind.
    """
    whole = Interval(min(seen.low, 0.0), max(seen.high, 0.0))
    if kind == "minmax" or not seen.largest:
        return whole
    if kind == "percentile":
        outside = (100 - percent) / 200
        low, high = (_quantile(seen, q) for q in (outside, 1 - outside))
        return Interval(min(max(low, whole.low), 0.0), max(min(high, whole.high), 0.0))
    if kind == "mse":
        return _least_error(seen, bits, whole)
    if kind == "kl":
        threshold = _least_divergence(seen.magnitudes) * seen.width
        return Interval(max(whole.low, -threshold), min(whole.high, threshold))
    raise UsageError(f"a range is one of {', '.join(RANGES)}, not '{kind}'")


def _quantile(seen: Histogram, share: float) -> float:
    total = seen.counts.cumsum(0)
    wanted = share * float(total[-1])
    place = int(torch.searchsorted(total, torch.tensor(wanted, dtype=total.dtype)))
    place = min(place, BINS - 1)
    before = float(total[place - 1]) if place else 0.0
    inside = float(seen.counts[place])
    part = (wanted - before) / inside if inside else 0.0
    return (place + part) * seen.width - seen.largest


def _least_error(seen: Histogram, bits: int, whole: Interval) -> Interval:
    shares = torch.arange(1, CANDIDATES + 1, dtype=torch.float64)[:, None] / CANDIDATES
    values, counts = seen.centres, seen.counts
    scale, zero = affine(shares * whole.low, shares * whole.high, bits)
    errors = (round_affine(values, scale, zero, bits) - values).square() @ counts
    best = float(shares[int(errors.argmin())])
    return Interval(best * whole.low, best * whole.high)


def _least_divergence(counts: Tensor) -> float:
    """Return the threshold of the least KL divergence, in bins."""
    best, threshold = torch.inf, float(len(counts))
    for last in range(LEVELS, len(counts) + 1, 16):
        inside = counts[:last]
        p = inside.clone()
        p[-1] += counts[last:].sum()
        spans = torch.arange(last) * LEVELS // last
        sums = torch.zeros(LEVELS, dtype=counts.dtype).index_add_(0, spans, inside)
        filled = (inside > 0).double()
        number = torch.zeros(LEVELS, dtype=counts.dtype).index_add_(0, spans, filled)
        q = (sums / number.clamp(min=1))[spans] * filled
        divergence = _divergence(p, q)
        if divergence < best:
            best, threshold = divergence, last + 0.5
    return threshold


def _divergence(p: Tensor, q: Tensor) -> float:
    """Compute KL(p ‖ q) of counts, with bins that only one of them has filled."""
    p = torch.where((p == 0) & (q != 0), TINY, p)
    q = torch.where((q == 0) & (p != 0), TINY, q)
    p, q = p / p.sum(), q / q.sum()
    used = p > 0
    return float((p[used] * (p[used] / q[used]).log()).sum())
