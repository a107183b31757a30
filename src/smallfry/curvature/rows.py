"""Rows: inputs and output gradients of a block, by sample and use."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Inputs and gradients of a block; F = 1/samples Σ vec(W) vec(W)ᵀ over draws and samples.

    A draw is one set of gradients for all samples: a sampled target, or a column of the
    Hessian's square root. Weights of draws, such as 1/√draws, are in the gradients.
    """

    inputs: Tensor  # (groups, samples, uses, inputs)
    gradients: Tensor  # (groups, draws, samples, uses, outputs)
    weights: Tensor | None = None  # (samples, uses), in means over inputs alone; None for ones

    @property
    def samples(self) -> int:
        """Number of samples in the batch."""
        return self.inputs.shape[1]

    @property
    def uses(self) -> int:
        """Number of uses of the weight per sample."""
        return self.inputs.shape[2]

    def double(self) -> "Rows":
        """Convert to float64."""
        weights = None if self.weights is None else self.weights.double()
        return Rows(self.inputs.double(), self.gradients.double(), weights)

    @property
    def mass(self) -> float:
        """Number of samples, weighted by their uses."""
        return self.samples if self.weights is None else float(self.weights.sum()) / self.uses
