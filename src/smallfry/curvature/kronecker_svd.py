"""Nearest sum of Kronecker products to a block's Fisher, min ‖F − Σ_k R_k ⊗ S_k‖.

The terms are the leading singular triplets of the rearranged block (Van Loan and Pitsianis 1993;
KPSVD, Deflation, Lanczos and KFAC-corrected of Koroko et al. 2022, arXiv 2201.10285), among pairs
of symmetric matrices. They are found without a power iteration on feature-sized matrices: through
sample-sized Gram matrices where each sample uses a weight once (``columns``), through the map
V ↦ mean of WᵀVW where it is shared (``shared_map``). Uses may be put together before:
``kronecker.reduced`` or ``terms.expanded`` make rows with one use.

Running averages are of the operator: stored terms, weighted, are added to the batch's Fisher, and
the result is the nearest sum to both together, not an average of factors. (With shared weights and
several stored terms the first pair of that may be indefinite; it is made semi-definite, which costs
up to a thousandth of the optimum.)
"""

from typing import Literal

import torch
from torch import Tensor

from smallfry.curvature.columns import (
    Columns,
    canonical_triplets,
    columns,
    factors,
    full_triplets,
    positive_triplet,
)
from smallfry.curvature.golub_kahan import Triplets, golub_kahan
from smallfry.curvature.kronecker import (
    NotFiniteError,
    eigendecompose,
    input_factor,
    output_factor,
)
from smallfry.curvature.rows import Rows
from smallfry.curvature.shared_map import SharedMap, shared_map
from smallfry.curvature.symmetric import random_symmetric
from smallfry.curvature.terms import Products, Terms
from smallfry.errors import UsageError

_TINY = torch.finfo(torch.float64).tiny
POWER_TOLERANCE = 1e-7  # the precision of a power iteration on Gram matrices

Solver = Literal["deflation", "lanczos", "full"]


def nearest_terms(
    rows: Rows,
    rank: int = 1,
    *,
    stored: Terms | None = None,
    keep: float = 0.0,
    solver: Solver = "deflation",
    tolerance: float | None = None,
) -> Terms:
    """Find the nearest sum of ``rank`` products to keep · Σ stored + (1 − keep) F.

    The first pair is positive semi-definite with at most one stored term, by construction; with
    more it is so up to what the stored sum has lost of an operator that was. Further pairs are
    indefinite in general. Signs are such that trace R ≥ 0.

    Args:
        rows: Rows of the block in a batch.
        rank: Number of products; those beyond the operator's rank are zero.
        stored: Stored terms of earlier batches, any number of them.
        keep: Their weight, from 0 to 1; 0 without ``stored``.
        solver: "deflation" finds the first triplet, then the others orthogonally to it;
            "lanczos" all from one Krylov space; "full" factors the Gram matrices completely,
            only with one use per sample.
        tolerance: On ‖Zᵀu − σv‖ / σ₁; by default what the rows' precision allows.

    Raises:
        NotFiniteError: The rows or the stored terms are not finite.
        UsageError: ``solver="full"`` with shared weights.
    """
    rows = in_full_precision(rows)
    products = None if stored is None or keep == 0 else _like(stored.products, rows)
    weights = _weights(rows, [] if products is None else [keep] * len(products.inputs))
    share = 1.0 if products is None else 1 - keep
    operator = _operator(rows, share, products, weights, None)
    return _solve(operator, rows, products, rank, solver, tolerance)


def kfac_correction(
    rows: Rows,
    rank: int = 1,
    *,
    a: Tensor | None = None,
    g: Tensor | None = None,
    stored: Terms | None = None,
    keep: float = 0.0,
    solver: Solver = "deflation",
) -> Terms:
    """Find the nearest sum of ``rank`` products to the residual of KFAC, F̄ − A' ⊗ G'.

    F̄ = keep (A ⊗ G + Σ stored) + (1 − keep) F is the running Fisher, A' and G' are the running
    factors after this batch, keep A + (1 − keep) E[a aᵀ] and likewise G'. With keep = 0, the
    correction is the leading canonical pair of the covariance between a aᵀ and g gᵀ: it is zero
    exactly where KFAC's independence holds.

    Args:
        rows: Rows of the block in a batch.
        rank: Number of products.
        a: KFAC's A before this batch, (groups, inputs, inputs); counts with ``keep`` only.
        g: KFAC's G before this batch, (groups, outputs, outputs).
        stored: The correction before this batch.
        keep: Weight of what was before.
        solver: See ``nearest_terms``.

    Raises:
        NotFiniteError: The rows, the factors or the stored terms are not finite.
        UsageError: ``solver="full"`` with shared weights.
    """
    rows = in_full_precision(rows)
    products, share = None, 1.0
    if keep > 0 and a is not None and g is not None:
        products, share = Products(a[None], g[None]), 1 - keep
        if stored is not None:
            products = _with(products, stored.products)
        products = _like(products, rows)
    kept = 0 if products is None else len(products.inputs)
    if rows.uses == 1:
        # A' and G' are sums over the very columns that the rest is made of
        downdate = _weights(rows, [share / rows.samples, *([keep] + [0.0] * kept)[:kept]])
        operator = _operator(rows, share, products, _weights(rows, [keep] * kept), downdate)
        return _solve(operator, rows, products, rank, solver)
    new = Products(input_factor(rows)[None], output_factor(rows)[None])
    if products is not None:
        old = zip(products, new, strict=True)
        new = Products(*(before[:1].lerp(fresh, share) for before, fresh in old))
    products = new if products is None else _with(products, new)
    operator = _operator(rows, share, products, _weights(rows, [keep] * kept + [-1.0]), None)
    return _solve(operator, rows, products, rank, solver)


def _operator(
    rows: Rows,
    share: float,
    products: Products | None,
    weights: Tensor,
    downdate: Tensor | None,
) -> Columns | SharedMap:
    if rows.uses == 1:
        return columns(rows, share, products, weights, downdate)
    return shared_map(rows, share, products, weights)


def _solve(
    operator: Columns | SharedMap,
    rows: Rows,
    products: Products | None,
    rank: int,
    solver: Solver,
    tolerance: float | None = None,
) -> Terms:
    """Compute terms from the leading triplets of an operator."""
    squared_norm = operator.squared_norm()
    if not bool(squared_norm.isfinite().all()):
        raise NotFiniteError("a block's inputs, gradients or stored terms are not finite")
    if isinstance(operator, SharedMap):
        found = _of_map(operator, rank, solver, tolerance)
        sides = [
            vectors.reshape(-1, rank, size, size).transpose(0, 1)
            for vectors, size in (
                (found.left, rows.inputs.shape[3]),
                (found.right, rows.gradients.shape[4]),
            )
        ]
        root = found.values.sqrt().to(rows.inputs).T[:, :, None, None]
        r, s = sides[0] * root, sides[1] * root
    else:
        found = column_triplets(operator, rows, rank, solver, tolerance)
        root = found.values.sqrt()[:, :, None]
        a, g = rows.inputs[:, :, 0], rows.gradients[:, :, :, 0].flatten(1, 2)
        r = factors(a, None if products is None else products.inputs, found.left * root)
        s = factors(g, None if products is None else products.outputs, found.right * root)
    for term, group in (r.diagonal(dim1=2, dim2=3).sum(2) < 0).nonzero().tolist():
        r[term, group].neg_()
        s[term, group].neg_()
    return Terms(r, s, found.values, squared_norm.clamp_min(0))


def column_triplets(
    operator: Columns, rows: Rows, rank: int, solver: Solver, tolerance: float | None
) -> Triplets:
    """Compute triplets in coefficients of columns."""
    if tolerance is None:
        tolerance = 1e-12 if rows.inputs.dtype == torch.float64 else 1e-6
    samples = rows.samples
    start = operator.weights.clone()
    start[samples + 1 :] = 0  # further stored terms are indefinite
    start = start.expand(len(operator.left), 1, -1)
    dual = operator.right_metric(start)[:, 0]
    if rank == 1 and solver != "full" and operator.is_positive and tolerance >= POWER_TOLERANCE:
        quick = positive_triplet(operator, start, tolerance)
        if quick is not None:
            return quick
    squares = operator.right.diagonal(dim1=1, dim2=2)[:, None]
    unit = torch.where(squares > 0, squares.clamp_min(_TINY).rsqrt(), 0.0)
    others = _random(rank, len(start[0, 0])).to(unit) * unit
    if solver == "full":
        found = full_triplets(operator, rank)
    else:
        found = _search(operator, start, others, rank, solver, tolerance)
        if found.residual > tolerance:
            found = full_triplets(operator, rank)
        else:
            found = canonical_triplets(operator, found)
    if not operator.is_positive:
        return found
    found = found.turned(dual, max(tolerance, 1e-9))
    for part in (found.left, found.right):  # Perron: what is below zero is rounding
        part[:, 0, : samples + 1] = part[:, 0, : samples + 1].clamp_min(0)
    return found


def _of_map(operator: SharedMap, rank: int, solver: Solver, tolerance: float | None) -> Triplets:
    """Convert triplets to matrices."""
    if solver == "full":
        raise UsageError(
            "solver='full' needs one use of the weight per sample; reduce or expand the rows, or "
            "use 'deflation' or 'lanczos'"
        )
    rows = operator.rows
    groups, outputs = len(rows.inputs), rows.gradients.shape[4]
    if tolerance is None:
        tolerance = 1e-11 if rows.inputs.dtype == torch.float64 else 1e-4
    identity = torch.eye(outputs, dtype=rows.inputs.dtype, device=rows.inputs.device)
    start = identity.flatten().expand(groups, 1, -1)
    others = random_symmetric(groups, rank, outputs, identity).flatten(2)
    if operator.stored is not None:
        # where the last batch left off, and a little of everything, lest it be blind somewhere
        before = operator.stored.sides[1]
        length = before.norm(dim=2, keepdim=True).clamp_min(torch.finfo(before.dtype).tiny)
        before = before / length
        start = before[:, :1] + 0.01 * start / outputs**0.5
        few = min(rank - 1, before.shape[1] - 1)
        others = 0.01 * others
        others[:, :few] += before[:, 1 : 1 + few]
    found = _search(operator, start, others, rank, solver, tolerance)
    if not operator.is_positive:
        return found
    found = found.turned(start[:, 0], max(tolerance, 1e-9))
    return _semidefinite_first(operator, found)


def _search(
    operator: Columns | SharedMap,
    start: Tensor,
    others: Tensor,
    rank: int,
    solver: Solver,
    tolerance: float,
) -> Triplets:
    """Search Krylov spaces, from the positive start alone for a positive map's first pair."""
    if not operator.is_positive:
        return golub_kahan(operator, others, rank, tolerance)
    if rank == 1:
        return golub_kahan(operator, start, 1, tolerance)
    if solver == "lanczos":
        return golub_kahan(operator, torch.cat([start, others[:, 1:]], 1), rank, tolerance)
    first = golub_kahan(operator, start, 1, tolerance)
    rest = golub_kahan(operator, others[:, 1:], rank - 1, tolerance, locked=first)
    return Triplets(
        torch.cat([first.values, rest.values], 1),
        torch.cat([first.left, rest.left], 1),
        torch.cat([first.right, rest.right], 1),
        max(first.residual, rest.residual),
    )


def _semidefinite_first(operator: SharedMap, found: Triplets) -> Triplets:
    """Make the smaller matrix of the first pair semi-definite, and the other its image.

    A completely positive map sends it to a semi-definite one; projecting costs the square of the
    tolerance. With stored terms that are indefinite the map need not be one, and it costs more.
    """
    inputs, outputs = operator.rows.inputs.shape[3], operator.rows.gradients.shape[4]
    left, right, values = found.left.clone(), found.right.clone(), found.values.clone()
    source, image, size, go = right, left, outputs, operator.apply
    if inputs < outputs:
        source, image, size, go = left, right, inputs, operator.adjoint
    eigen = eigendecompose(source[:, 0].reshape(-1, size, size))
    matrix = (eigen.vectors * eigen.values[:, None]) @ eigen.vectors.transpose(1, 2)
    # sums of squares: over a million float32 numbers, norm() is wrong in the fifth digit
    length = matrix.square().sum((1, 2)).sqrt()[:, None]
    source[:, 0] = matrix.flatten(1) / length.clamp_min(torch.finfo(matrix.dtype).tiny)
    target = go(source[:, :1])[:, 0]
    length = target.square().sum(1).sqrt()
    image[:, 0] = target / length[:, None].clamp_min(torch.finfo(target.dtype).tiny)
    values[:, 0] = length.double()
    return Triplets(values, left, right, found.residual)


def _random(count: int, size: int) -> Tensor:
    """Draw fixed pseudorandom numbers, (count, size)."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(size))


def _with(first: Products, second: Products) -> Products:
    pairs = zip(first, second, strict=True)
    return Products(*(torch.cat([a, b.to(a)]) for a, b in pairs))


def _like(products: Products, rows: Rows) -> Products:
    return Products(*(part.to(rows.inputs) for part in products))


def _weights(rows: Rows, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=rows.inputs.device)


def in_full_precision(rows: Rows) -> Rows:
    """Convert rows to float32 or higher."""
    if rows.inputs.dtype in (torch.float32, torch.float64):
        return rows
    return Rows(rows.inputs.float(), rows.gradients.float())
