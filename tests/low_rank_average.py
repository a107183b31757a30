"""The running average of a factor's leading pairs in one process."""

from smallfry.curvature.low_rank import Average, gram_times


def average(old, rows, keep, rank, generator):
    """Compute the leading pairs of keep · old + (1 − keep) · rowsᵀ rows."""
    mean = Average(old, keep, rank)
    first = mean.directions(rows, generator)
    basis = mean.basis(first, gram_times(rows, first))
    return mean.pairs(basis, gram_times(rows, basis), (rows**2).sum((1, 2)))
