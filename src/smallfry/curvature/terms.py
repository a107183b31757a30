"""Sums of Kronecker products, Σ R_k ⊗ S_k, as approximations of a block's Fisher."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.curvature.kronecker import fisher_squared_norm, inner_product, relative_error
from smallfry.curvature.rows import Rows


class Products(NamedTuple):
    """Matrices that stand for R_k ⊗ S_k."""

    inputs: Tensor  # (count, groups, inputs, inputs), symmetric
    outputs: Tensor  # (count, groups, outputs, outputs), symmetric

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Input and output matrices as rows, (groups, count, size · size)."""
        return self.inputs.flatten(2).transpose(0, 1), self.outputs.flatten(2).transpose(0, 1)


class Terms(NamedTuple):
    """Σ_k R_k ⊗ S_k, with σ_k split evenly: ‖R_k‖ = ‖S_k‖ = √σ_k."""

    inputs: Tensor  # R, (rank, groups, inputs, inputs), symmetric
    outputs: Tensor  # S, (rank, groups, outputs, outputs), symmetric
    values: Tensor  # σ, (groups, rank), descending, float64
    squared_norm: Tensor  # (groups,), of what they approximate, float64

    @property
    def rank(self) -> int:
        """Number of products."""
        return self.inputs.shape[0]

    @property
    def products(self) -> Products:
        """Matrices without values and norm."""
        return Products(self.inputs, self.outputs)

    @property
    def error(self) -> float:
        """‖target − Σ R ⊗ S‖ / ‖target‖, over all groups: ‖target‖² − Σ σ² is what is missed."""
        missed = self.squared_norm.sum() - (self.values**2).sum()
        return relative_error(missed, self.squared_norm.sum())

    def leading(self, rank: int) -> "Terms":
        """Keep the first terms, which are also the nearest sum of that length."""
        return Terms(
            self.inputs[:rank], self.outputs[:rank], self.values[:, :rank], self.squared_norm
        )


def terms_error(rows: Rows, terms: Terms) -> float:
    """Compute ‖F − Σ R_k ⊗ S_k‖ / ‖F‖ of a batch for any terms, without forming F."""
    fisher = fisher_squared_norm(rows)
    error = fisher.clone()
    for a, g in zip(terms.inputs, terms.outputs, strict=True):
        error -= 2 * inner_product(rows, a, g)
    r, s = terms.products.sides
    error += ((r @ r.transpose(1, 2)) * (s @ s.transpose(1, 2))).sum()
    return relative_error(error, fisher)


def joined(parts: Sequence[Rows]) -> Rows:
    """Join the rows of several batches into those of one.

    Where parts differ in uses or draws, the missing ones are zeros.
    """
    if len(parts) == 1:
        return parts[0]
    uses = max(part.uses for part in parts)
    draws = max(part.gradients.shape[1] for part in parts)
    inputs, gradients = [], []
    for part in parts:
        short, few = uses - part.uses, draws - part.gradients.shape[1]
        inputs.append(F.pad(part.inputs, (0, 0, 0, short)))
        gradients.append(F.pad(part.gradients, (0, 0, 0, short, 0, 0, 0, few)))
    return Rows(torch.cat(inputs, 1), torch.cat(gradients, 2))


def expanded(parts: Sequence[Rows]) -> Rows:
    """Treat uses as samples of their own, dropping the correlation between uses of a sample.

    The gradients are scaled by √(uses of a sample on average), so that F, a mean over samples,
    sums over uses.
    """
    samples = sum(part.samples for part in parts)
    scale = (sum(part.samples * part.uses for part in parts) / samples) ** 0.5
    return joined(
        [
            Rows(
                part.inputs.flatten(1, 2).unsqueeze(2),
                part.gradients.flatten(2, 3).unsqueeze(3) * scale,
            )
            for part in parts
        ]
    )
