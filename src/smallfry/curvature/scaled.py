"""Likelihood of a weighted part of a loss."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from smallfry.curvature.likelihoods import Likelihood, Outputs
from smallfry.curvature.loss_scale import Scale
from smallfry.curvature.row_weights import RowWeights
from smallfry.errors import UsageError


class Scaled(Likelihood):
    """Likelihood whose negative logarithm has a factor in the loss.

    The Fisher and the divergence have the factor too, as the loss's curvature does.

    Args:
        inner: The likelihood.
        factor: Its factor in the loss; "mean" for the mean over positions, as PyTorch's
            ``reduction="mean"`` takes it.

    Example:
        >>> import torch
        >>> from smallfry.curvature.likelihoods import Bernoulli
        >>> from smallfry.curvature.scaled import Scaled
        >>> (column,) = Scaled(Bernoulli(), 0.5).columns((torch.zeros(1, 1),))
        >>> round((column[0] ** 2).item(), 6)
        0.125
    """

    def __init__(self, inner: Likelihood, factor: float | Literal["mean"]) -> None:
        if factor != "mean" and not factor > 0:
            raise UsageError(f"the factor of a likelihood must be above 0, not {factor}")
        self.inner, self.factor = inner, factor

    def _in(self, outputs: Outputs) -> float:
        return self.inner.mean_factor(outputs) if self.factor == "mean" else self.factor

    def select(self, output: Any) -> Outputs:
        """Select the tensors of the inner likelihood."""
        return self.inner.select(output)

    def of_last(self) -> "Scaled":
        """Return the likelihood of the outputs selected last."""
        return Scaled(self.inner.of_last(), self.factor)

    def rows(self, outputs: Outputs) -> int:
        """Return the rows of the inner likelihood's outputs."""
        return self.inner.rows(outputs)

    def is_density(self, outputs: Outputs) -> bool:
        """Return whether the inner likelihood is a density."""
        return self.inner.is_density(outputs)

    def sample_gradients(self, outputs: Outputs, generator: torch.Generator) -> Outputs:
        """Return the inner gradients times the root of the factor."""
        return _times(self._in(outputs) ** 0.5, self.inner.sample_gradients(outputs, generator))

    def columns(self, outputs: Outputs) -> Iterator[Outputs]:
        """Return the inner columns times the root of the factor."""
        root = self._in(outputs) ** 0.5
        return (_times(root, column) for column in self.inner.columns(outputs))

    def hessian_product(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Return the inner product times the factor."""
        return _times(self._in(outputs), self.inner.hessian_product(outputs, tangents))

    def divergence(
        self, before: Outputs, after: Outputs, weights: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Return the inner divergence times the factor."""
        return self._in(before) * self.inner.divergence(before, after, weights)

    def row_weights(self, outputs: Outputs, index: int, gradient: Tensor) -> RowWeights | None:
        """Infer weights from the gradient over the factor."""
        return self.inner.row_weights(outputs, index, gradient / self._in(outputs))

    def given_weights(self, outputs: Outputs, index: int, given: Any) -> RowWeights:
        """Convert user-given weights by the inner likelihood."""
        return self.inner.given_weights(outputs, index, given)

    def loss_factor(
        self, outputs: Outputs, gradients: Outputs, stated: float = 1.0
    ) -> Scale | None:
        """Infer the factor of the whole loss, beside this one."""
        own = self._in(outputs)
        return self.inner.loss_factor(outputs, _times(1 / own, gradients), stated)

    def targets(
        self,
        outputs: Outputs,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor | None] | None = None,
    ) -> float:
        """Return the inner targets times the factor."""
        return self._in(outputs) * self.inner.targets(outputs, gradients, weights)

    def mean_factor(self, outputs: Outputs) -> float:
        """Return the inner ratio over the factor."""
        return self.inner.mean_factor(outputs) / self._in(outputs)


def _times(factor: float, tensors: Outputs) -> Outputs:
    return tuple(factor * z for z in tensors)
