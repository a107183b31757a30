"""SNGD: natural gradient with a local metric for each layer (Liu et al. 2024, arXiv 2412.07441).

"input"   The metric of a layer is that of its inputs alone, F̂ = E[x xᵀ] ⊗ I: KFAC with G = I.
          Gradient descent on a network with local Fisher layers makes the same steps
          (``curvature/fisher_layers.py``).
"rfim"    The form of the paper's code: hidden layers have a metric for every output neuron,
          F̂_o = E[σ(z_o)² x xᵀ] with z_o the neuron's pre-activation and σ the logistic function,
          the relative Fisher information of a softplus neuron; the first and the last layer
          have "input".

Neither needs sampled targets, so a refresh takes no backward pass of its own. The metric is
independent of the loss: steps are in units of inputs alone.
"""

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import damped_inverse, pack, packed_mean, unpack
from smallfry.errors import UsageError
from smallfry.optim.approximation import (
    Approximation,
    State,
    Sum,
    Summed,
    Updating,
    eigenvalue_range,
    running,
)
from smallfry.optim.base import NaturalGradient
from smallfry.optim.numerics import statistics_dtype
from smallfry.optim.one_hot import OneHotInputs
from smallfry.optim.settings import Settings

LARGEST = 2**27  # numbers in the metrics of a layer's neurons together


class SNGD(NaturalGradient):
    """Natural gradient with local metrics of the inputs.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        variant: "input", or "rfim" for a metric for every hidden neuron, of which a layer's
            outputs · inputs² may not pass 2²⁷.
        settings: Those of ``NaturalGradient``.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import SNGD
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = SNGD(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        variant: Literal["input", "rfim"] = "input",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(model, lr, InputMetric(variant), **settings)


class InputMetric(Approximation):
    """E[x xᵀ] for a layer or for each of its neurons; the argument is that of ``SNGD``."""

    sharing_choices = ("expand",)
    needs_gradients = False
    divides = True

    def __init__(self, variant: str = "input") -> None:
        super().__init__("expand")
        if variant not in ("input", "rfim"):
            raise UsageError(f"variant is 'input' or 'rfim', not '{variant}'")
        self.variant = variant
        self._hidden: set[str] = set()

    def for_one_hot(self) -> Approximation:
        """Return a method of frequencies."""
        return OneHotInputs()

    def settings(self) -> dict[str, Any]:
        """Return the settings of a saved state, as plain data."""
        return {"variant": self.variant}

    def check(self, blocks: Sequence[Block]) -> None:
        """Validate the size of the metrics of all neurons."""
        if self.variant == "input":
            return
        self._hidden = {block.name for block in blocks[1:-1]}
        for block in blocks:
            groups, outputs, inputs = block.shape
            size = groups * outputs * inputs**2
            if block.name in self._hidden and size > LARGEST:
                raise UsageError(
                    f"layer '{next(iter(block.layers))}' would need {outputs} metrics of "
                    f"{inputs}² numbers, {4 * size / 1e9:.1f} GB: take variant='input', or "
                    "exclude it"
                )

    def updating(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        samples: float,
        keep: float,
        generator: torch.Generator,
    ) -> Updating:
        """Update from the sum of the metrics of all uses, and their number."""
        like = next(iter(block.parameters.values()))
        neurons = block.shape[1] if block.name in self._hidden else 1
        size = block.shape[2]
        total = like.new_zeros(
            block.shape[0] * neurons, size * (size + 1) // 2, dtype=statistics_dtype(like.dtype)
        )
        count = total.new_zeros(())
        for part in rows:
            x = part.inputs.flatten(1, 2)  # (groups, rows, inputs)
            if part.weights is not None:
                x = x * part.weights.sqrt().reshape(-1, 1)
            count = count + part.mass * part.uses
            if block.name not in self._hidden:
                total = total + pack(x.transpose(1, 2) @ x)
                continue
            tensors = {name: p.detach() for name, p in block.parameters.items()}
            z = x @ block.to_matrix(tensors).to(x).transpose(1, 2)
            weight = z.sigmoid().square().transpose(1, 2)  # (groups, outputs, rows)
            metrics = [
                (x[h] * one[:, None]).T @ x[h]
                for h, neurons_of in enumerate(weight)
                for one in neurons_of
            ]
            total = total + pack(torch.stack(metrics))
        totals = yield Sum({"metric": total, "count": count})
        if totals is not None:
            fresh = totals["metric"] / totals["count"]
            state["metric"] = running(state, "metric", fresh, keep)

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Invert every metric."""
        metric = unpack(state["metric"])
        inverse = damped_inverse(metric, metric.new_full((len(metric),), damping))
        state["inverse"] = pack(inverse.matrix)
        return inverse.raised

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Multiply each neuron's row by its inverse."""
        inverse = unpack(state["inverse"])
        if block.name not in self._hidden:
            return matrix @ inverse
        rows = matrix.flatten(0, 1).unsqueeze(1)  # (groups · outputs, 1, inputs)
        return (rows @ inverse).reshape(matrix.shape)

    def trace(self, block: Block, state: State) -> float:
        """Compute the trace of all neurons' metrics."""
        means = packed_mean(state["metric"]).double()
        neurons = 1 if block.name in self._hidden else block.shape[1]
        return float(means.sum()) * block.shape[2] * neurons

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the approximation: words, numbers kept, multiply-adds of an inversion."""
        groups, outputs, inputs = block.shape
        count = groups * (outputs if block.name in self._hidden else 1)
        words = "a metric for each neuron" if block.name in self._hidden else "metric of inputs"
        return words, count * inputs * (inputs + 1), count * inputs**3

    def summed(self, block: Block) -> Summed:
        """Describe the metrics, and the number of uses."""
        groups, outputs, inputs = block.shape
        count = groups * (outputs if block.name in self._hidden else 1)
        return Summed(count * inputs * (inputs + 1) // 2 + 1, 0, 0, count * inputs**2)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute the eigenvalue range over all metrics."""
        return {"inputs": eigenvalue_range(unpack(state["metric"]))}
