"""Likelihood of stable-max: classes whose probabilities are s(z) / Σ s(z), without exponentials.

s(z) = z + 1 for z ≥ 0 and 1 / (1 − z) below, so that log s(z) = sign(z) log(1 + |z|). With
u = log s(z) it is the softmax of u, and du/dz = 1 / (1 + |z|): gradients and Fisher are those of
``Categorical`` at u, times du/dz. As u is no linear function of z, the Fisher is not the Hessian
of the loss, but the part of it that is never negative. Prieto et al. 2025, arXiv 2501.04697.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smallfry.curvature.likelihoods import Categorical, Outputs
from smallfry.curvature.loss_scale import Scale
from smallfry.curvature.row_weights import RowWeights


def log_stable(z: Tensor) -> Tensor:
    """Compute log s(z), element by element; its gradient at zero is 1, as to either side."""
    zero = torch.zeros_like(z)  # where PyTorch divides the gradient of a maximum by two
    return torch.maximum(z, zero).log1p() - torch.maximum(-z, zero).log1p()


class StableMax(Categorical):
    """One of several classes by stable-max; arguments as of ``Categorical``.

    Example:
        >>> import torch
        >>> from smallfry.curvature.stablemax import StableMax
        >>> z, generator = torch.tensor([[0.0, 2.0]]), torch.Generator().manual_seed(0)
        >>> (first, second) = StableMax().columns((z,))
        >>> (first[0].T @ first[0] + second[0].T @ second[0]).round(decimals=4)
        tensor([[ 0.1875, -0.0625],
                [-0.0625,  0.0208]])
    """

    def is_density(self, outputs: Outputs) -> bool:
        """Require finite logits: none makes a class impossible."""
        return bool(outputs[0].isfinite().all())

    def row_weights(self, outputs: Outputs, index: int, gradient: Tensor) -> RowWeights | None:
        """Infer weights from the gradient at u."""
        return super().row_weights((_u(outputs),), index, gradient * _slope(outputs))

    def sample_gradients(self, outputs: Outputs, generator: torch.Generator) -> Outputs:
        """Return probabilities minus the one-hot sample, times du/dz."""
        return self._at_z(super().sample_gradients((_u(outputs),), generator), outputs)

    def columns(self, outputs: Outputs) -> Iterator[Outputs]:
        """Return √p_k (p − e_k) du/dz for each class k, at each position."""
        for column in super().columns((_u(outputs),)):
            yield self._at_z(column, outputs)

    def hessian_product(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Compute D (diag(p) − p pᵀ) D u with D = diag(du/dz), the Fisher's product."""
        inner = (tangents[0] / _slope(outputs),)
        return self._at_z(super().hessian_product((_u(outputs),), inner), outputs)

    def divergence(
        self, before: Outputs, after: Outputs, weights: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Compute Σ p log(p / p')."""
        return super().divergence((_u(before),), (_u(after),), weights)

    def loss_factor(
        self, outputs: Outputs, gradients: Outputs, stated: float = 1.0
    ) -> Scale | None:
        """Infer the factor from the gradient at u."""
        return super().loss_factor((_u(outputs),), (gradients[0] * _slope(outputs),), stated)

    def _at_z(self, found: Outputs, outputs: Outputs) -> Outputs:
        return ((found[0] / _slope(outputs)).to(outputs[0]),)


def _u(outputs: Outputs) -> Any:
    return log_stable(outputs[0])


def _slope(outputs: Outputs) -> Tensor:
    """Compute dz/du = 1 + |z|."""
    return 1 + outputs[0].abs()
