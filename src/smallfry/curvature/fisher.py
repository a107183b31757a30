"""Exact Fisher of a batch in implicit form: products, Gram matrices, damped solves.

F = (1/N) J Jᵀ, where the columns of J are the gradients vec(W_n) of the samples, one for each draw.
With blocks, J stacks them; the whole-network Fisher couples blocks, the block-diagonal one does
not. A vector is a mapping from block to matrix (groups, outputs, inputs). The damped solve goes
through sample space by Woodbury's identity,

    (F + λ I)⁻¹ x = (x − J (N λ I + JᵀJ)⁻¹ Jᵀ x) / λ,

so that nothing larger than samples × samples is factored.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from smallfry.curvature.rows import Rows

K = TypeVar("K", bound=Hashable)


def projections(rows: Rows, x: Tensor) -> Tensor:
    """Compute Jᵀ x = ⟨W, X⟩ for every draw and sample, (draws · samples,).

    Args:
        rows: Rows of a block.
        x: (groups, outputs, inputs).
    """
    mapped = torch.einsum("hnti,hoi->hnto", rows.inputs, x)
    return torch.einsum("hknto,hnto->kn", rows.gradients, mapped).reshape(-1)


def combine(rows: Rows, coefficients: Tensor) -> Tensor:
    """Compute J v = Σ v_kn W_kn, (groups, outputs, inputs).

    Args:
        rows: Rows of a block.
        coefficients: (draws · samples,), in the order of ``projections``.
    """
    v = coefficients.reshape(rows.gradients.shape[1], rows.samples)
    weighted = torch.einsum("hknto,kn->hnto", rows.gradients, v)
    return weighted.flatten(1, 2).transpose(1, 2) @ rows.inputs.flatten(1, 2)


def gram(rows: Rows) -> Tensor:
    """Compute JᵀJ: inner products ⟨W, W'⟩ of all draws and samples, (draws · samples,) squared.

    Through the inputs' and the gradients' own Gram matrices, or through W, as is cheaper.
    """
    a, g = rows.inputs, rows.gradients
    groups, draws, samples, uses, outputs = g.shape
    inputs, count = a.shape[3], draws * samples
    if uses == 1:
        aa = a[:, :, 0] @ a[:, :, 0].transpose(1, 2)  # (groups, samples, samples)
        flat = g.reshape(groups, count, outputs)
        gg = flat @ flat.transpose(1, 2)
        return (aa.repeat(1, draws, draws) * gg).sum(0)
    formed = count * outputs * inputs * (uses + count)
    paired = (samples * uses) ** 2 * inputs + (count * uses) ** 2 * outputs
    if formed <= paired or count * uses > 8192:
        w = (g.transpose(3, 4) @ a[:, None]).reshape(groups, count, outputs * inputs)
        w = w.transpose(0, 1).reshape(count, -1)
        return w @ w.T
    total = a.new_zeros(count, count)
    for h in range(groups):
        flat_a = a[h].reshape(samples * uses, inputs)
        flat_g = g[h].reshape(count * uses, outputs)
        aa = (flat_a @ flat_a.T).reshape(samples, uses, samples, uses)
        gg = (flat_g @ flat_g.T).reshape(draws, samples, uses, draws, samples, uses)
        total += torch.einsum("ntms,kntjms->knjm", aa, gg).reshape(count, count)
    return total


class Woodbury(NamedTuple):
    """Factorisation of N λ I + JᵀJ, with its J."""

    factor: Tensor  # (draws · samples,) squared, lower Cholesky factor, float64
    damping: float


def woodbury(gram_matrix: Tensor, samples: int, damping: float) -> Woodbury:
    """Factor N λ I + JᵀJ in float64.

    Args:
        gram_matrix: JᵀJ; summed over blocks for the whole-network Fisher.
        samples: N.
        damping: λ, positive; raised tenfold until the matrix can be factored.

    Raises:
        ArithmeticError: The Gram matrix is not finite.
    """
    symmetric = (gram_matrix + gram_matrix.T).to(torch.float64) / 2
    for _ in range(12):
        matrix = symmetric.clone()
        matrix.diagonal().add_(samples * damping)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if not bool(info):
            return Woodbury(lower, damping)
        damping *= 10.0  # rounding made it indefinite: more damping than asked for
    raise ArithmeticError("the Gram matrix can't be factored, however damped")


def damped_solve(rows: Mapping[K, Rows], x: Mapping[K, Tensor], w: Woodbury) -> dict[K, Tensor]:
    """Compute (F + λ I)⁻¹ x; for one block alone, give only that block.

    x − J (…) loses about ‖F‖/λ of the precision: coefficients are taken in float64.
    """
    inner = torch.stack([projections(rows[key], x[key]).double() for key in rows]).sum(0)
    v = torch.cholesky_solve(inner[:, None], w.factor)[:, 0]
    return {key: (x[key] - combine(rows[key], v.to(x[key].dtype))) / w.damping for key in rows}
