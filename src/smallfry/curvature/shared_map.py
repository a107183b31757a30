"""Rearranged Fisher of a block with weight sharing, as a map between matrices.

With W_n = Σ_uses g aᵀ the gradient of a sample, F = 1/samples Σ vec(W_n) vec(W_n)ᵀ rearranges to
the completely positive map

    Z[V] = 1/samples Σ W_nᵀ V W_n,        Zᵀ[U] = 1/samples Σ W_n U W_nᵀ,

which needs no pairs of uses. It is applied through the W_n, or, where there are few uses, from
their factors: W_nᵀ V W_n = A_nᵀ (G_n V G_nᵀ) A_n. Symmetric matrices go to symmetric ones, and
positive semi-definite ones to such.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from smallfry.curvature.fisher import gram
from smallfry.curvature.rows import Rows
from smallfry.curvature.symmetric import symmetric_product
from smallfry.curvature.terms import Products

_FORMED = 2**27  # most numbers in all the W_n together
_PAIRED = 2**23  # most pairs of uses at a time


class SharedMap(NamedTuple):
    """``share`` F + Σ weights_k R_k ⊗ S_k, rearranged; a ``golub_kahan.Map``.

    Vectors are symmetric matrices, (groups, count, size · size).
    """

    rows: Rows
    gradients: Tensor | None  # all W_n, (groups, outputs, draws · samples · inputs), if formed
    share: float
    stored: Products | None
    weights: Tensor  # (stored,), float64

    @property
    def cancelled(self) -> float:
        """Zero: the metric is the identity, so nothing cancels."""
        return 0.0

    def left_bound(self, x: Tensor) -> Tensor:
        """Return the lengths."""
        return (x**2).sum(2).sqrt()

    def right_bound(self, x: Tensor) -> Tensor:
        """Return the lengths."""
        return (x**2).sum(2).sqrt()

    def apply(self, dual: Tensor) -> Tensor:
        """Apply Z to matrices on the outputs' side."""
        own = self._own(dual, forward=True)
        if self.stored is None:
            return own
        r, s = self.stored.sides
        return own + ((dual @ s.transpose(1, 2)) * self.weights.to(dual)) @ r

    def adjoint(self, dual: Tensor) -> Tensor:
        """Apply Zᵀ to matrices on the inputs' side."""
        own = self._own(dual, forward=False)
        if self.stored is None:
            return own
        r, s = self.stored.sides
        return own + ((dual @ r.transpose(1, 2)) * self.weights.to(dual)) @ s

    def left_metric(self, x: Tensor) -> Tensor:
        """Return the matrices, their own duals."""
        return x

    def right_metric(self, x: Tensor) -> Tensor:
        """Return the matrices, their own duals."""
        return x

    @property
    def is_positive(self) -> bool:
        """True if semi-definite matrices should map to semi-definite ones."""
        return bool((self.weights >= 0).all())

    def squared_norm(self) -> Tensor:
        """Compute ‖share F + Σ weights R ⊗ S‖², (groups,), float64."""
        total = self.share**2 * _fisher_squared_norms(self.rows, self.gradients)
        if self.stored is None:
            return total
        r, s = self.stored.sides
        mixed = (self._own(s, forward=True) * r).sum(2).double()
        pairs = (r @ r.transpose(1, 2)).double() * (s @ s.transpose(1, 2)).double()
        return total + 2 * mixed @ self.weights + self.weights @ pairs @ self.weights

    def _own(self, matrices: Tensor, forward: bool) -> Tensor:
        """Compute share Z_F[V] or share Z_Fᵀ[U]."""
        groups, count, _ = matrices.shape
        a, g = self.rows.inputs, self.rows.gradients
        samples = self.rows.samples
        if self.gradients is not None:
            outputs, inputs = g.shape[4], a.shape[3]
            w = self.gradients
            if forward:
                stacked = matrices.reshape(groups, count * outputs, outputs) @ w
                left = stacked.reshape(groups * count, -1, inputs)
                right = w.reshape(groups, -1, inputs).repeat_interleave(count, 0)
                result = symmetric_product(right, left)
            else:
                tall = w.reshape(groups, -1, inputs)
                wide = matrices.reshape(groups, count, inputs, inputs)
                left = (tall[:, None] @ wide).reshape(groups * count, outputs, -1)
                right = w.repeat_interleave(count, 0)
                result = symmetric_product(right.transpose(1, 2), left.transpose(1, 2))
            return result.reshape(groups, count, -1) * (self.share / samples)
        size = a.shape[3] if forward else g.shape[4]
        total = matrices.new_zeros(groups, count, size, size)
        for one in range(count):
            side = int(matrices.shape[2] ** 0.5)
            matrix = matrices[:, one].reshape(groups, side, side)
            total[:, one] = self._factored(matrix, forward)
        return total.flatten(2) * (self.share / samples)

    def _factored(self, matrix: Tensor, forward: bool) -> Tensor:
        """Compute Σ A_nᵀ (G_n V G_nᵀ) A_n, or Σ G_nᵀ (A_n U A_nᵀ) G_n."""
        total: Tensor | None = None
        chunk = max(1, _PAIRED // self.rows.uses**2)
        for start in range(0, self.rows.samples, chunk):
            a = self.rows.inputs[:, start : start + chunk]  # (groups, chunk, uses, inputs)
            g = self.rows.gradients[:, :, start : start + chunk]
            if forward:
                pairs = ((g @ matrix[:, None, None]) @ g.transpose(3, 4)).sum(1)
                one = symmetric_product(a.flatten(1, 2), (pairs @ a).flatten(1, 2))
            else:
                pairs = (a @ matrix[:, None]) @ a.transpose(2, 3)
                one = symmetric_product(g.flatten(1, 3), (pairs[:, None] @ g).flatten(1, 3))
            total = one if total is None else total + one
        assert total is not None
        return total


def shared_map(rows: Rows, share: float, stored: Products | None, weights: Tensor) -> SharedMap:
    """Build the map of a batch and of stored products, in the cheaper of its two forms.

    Args:
        rows: Rows of the block.
        share: Weight of the batch's own Fisher.
        stored: Products R_k ⊗ S_k.
        weights: (stored,), float64, of any sign.
    """
    groups, draws, samples, uses, outputs = rows.gradients.shape
    inputs, count = rows.inputs.shape[3], draws * samples
    through_gradients = count * outputs * inputs * (outputs + inputs)
    through_uses = (
        samples * uses * (draws * outputs**2 + draws * uses * outputs + uses * inputs + inputs**2)
    )
    formed = None
    if through_gradients <= through_uses and groups * count * outputs * inputs <= _FORMED:
        w = rows.gradients.transpose(3, 4) @ rows.inputs[:, None]
        formed = w.permute(0, 3, 1, 2, 4).reshape(groups, outputs, -1)
    return SharedMap(rows, formed, share, stored, weights)


def _fisher_squared_norms(rows: Rows, gradients: Tensor | None) -> Tensor:
    """Compute ‖F‖² of every group, float64."""
    groups, draws, samples, _, outputs = rows.gradients.shape
    squares = []
    for h in range(groups):
        if gradients is None:
            products = gram(Rows(rows.inputs[h : h + 1], rows.gradients[h : h + 1]))
        else:
            w = gradients[h].reshape(outputs, draws * samples, -1).transpose(0, 1).flatten(1)
            products = w @ w.T
        squares.append((products.double() ** 2).sum())
    return torch.stack(squares) / samples**2
