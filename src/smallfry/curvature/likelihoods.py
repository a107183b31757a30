"""Likelihoods: densities of the targets given the outputs, their Fisher and divergence.

A likelihood turns the model's output into a density p(y | x), sample by sample, summed over
outputs. From it come the gradients that the Fisher is made of, taken at the output z:

    Monte Carlo   g = −∇_z log p(ŷ | x) with ŷ drawn from the density
    exact         columns of a square root of E[g gᵀ], the Hessian of −log p there

Categorical, Bernoulli and Gaussian are exponential families in z, −log p = A(z) − t·z, so that

    Hessian           = ∇²A(z)
    loss(z') − loss(z) = g·(z' − z) + KL(p_z ‖ p_z')

with g the gradient of the actual loss: how much a step gained is known without the targets.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry._torch import is_functorch_wrapped_tensor
from smallfry.curvature.loss_scale import Scale, infer_scale, rounding_of_probabilities
from smallfry.curvature.row_weights import (
    RowWeights,
    certain_rows,
    common_weight,
    given_weights,
    read_weights,
    rounding_of,
    with_certain_rows,
)
from smallfry.errors import UsageError

Outputs = tuple[Tensor, ...]


class Likelihood(ABC):
    """Density of the targets given the model's output."""

    @abstractmethod
    def select(self, output: Any) -> Outputs:
        """Select the tensors (samples, …) that the density is a function of."""

    @abstractmethod
    def sample_gradients(self, outputs: Outputs, generator: torch.Generator) -> Outputs:
        """Return −∇ log p of one sampled target, at the outputs."""

    def of_last(self) -> "Likelihood":
        """Return the likelihood of the outputs selected last, whatever is selected next."""
        return self

    def rows(self, outputs: Outputs) -> int:
        """Return the size of the outputs' first dimension: the samples, or these with tokens."""
        return next((z.shape[0] for z in outputs if z.ndim), 1)

    def is_density(self, outputs: Outputs) -> bool:
        """Return whether targets can be drawn, which takes finite outputs."""
        return all(bool(z.isfinite().all()) for z in outputs)

    def columns(self, outputs: Outputs) -> Iterator[Outputs]:
        """Return columns whose outer products sum to the Hessian of −log p, sample by sample."""
        raise self._unable("fisher='exact'")

    def row_weights(self, outputs: Outputs, index: int, gradient: Tensor) -> RowWeights | None:
        """Infer the row weights of one output from the training gradient there.

        Args:
            outputs: All outputs.
            index: Index of this output.
            gradient: Gradient of the training loss there, as computed by autograd: its precision is
                that of the output.

        Returns:
            None if no row counts in the loss.
        """
        return RowWeights(None, None)

    def given_weights(self, outputs: Outputs, index: int, given: Any) -> RowWeights:
        """Convert user-given weights to the rows of one output.

        Raises:
            ValueError: They don't fit the output.
        """
        return given_weights(given, outputs[index], None)

    def hessian_product(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Multiply the Hessian of −log p by tangents."""
        raise self._unable("the quadratic model")

    def divergence(
        self, before: Outputs, after: Outputs, weights: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Compute KL(before ‖ after) of each sample, (samples,).

        Args:
            before: Outputs.
            after: Other outputs.
            weights: Row weights, broadcastable to each output; None for ones.
        """
        raise self._unable("adaptive damping")

    def targets(
        self,
        outputs: Outputs,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor | None] | None = None,
    ) -> float:
        """Count the targets per sample; the allowed divergence is per target.

        Args:
            outputs: Outputs of the model.
            gradients: Gradients of each sample's own negative log-likelihood at the outputs.
            weights: Row weights, as in ``divergence``: a target counts by that of its row.
        """
        return 1.0

    def loss_factor(
        self, outputs: Outputs, gradients: Outputs, stated: float = 1.0
    ) -> Scale | None:
        """Infer the factor of the loss.

        Args:
            outputs: Outputs of the model.
            gradients: Gradients of the training loss there, times samples.
            stated: Expected factor. Rounding gives probabilities near 1 an error of about
                machine epsilon, and the gradients one of so many times that.

        Returns:
            None if the gradients are rounding errors, or do not depend on the factor.
        """
        return None

    def mean_factor(self, outputs: Outputs) -> float:
        """Return the ratio of PyTorch's ``reduction="mean"`` to the mean per sample."""
        raise self._unable("loss_scale='mean'")

    def _unable(self, what: str) -> UsageError:
        return UsageError(
            f"{what} needs a categorical, bernoulli or gaussian likelihood, not "
            f"{type(self).__name__}; use fisher='mc', a number for loss_scale, and neither "
            f"adaptive damping nor the quadratic model"
        )


class _Family(Likelihood):
    """Exponential family in the model's single output tensor."""

    shape: tuple[str, ...] = ("samples",)  # first dimensions of the output

    def select(self, output: Any) -> Outputs:
        if not isinstance(output, Tensor):
            raise UsageError(
                f"the {type(self).__name__} likelihood expects a model that returns a tensor, not "
                f"{type(output).__name__}; name its parts by attribute, key or index: "
                "likelihood={'logits': 'categorical'} or {0: 'categorical'}"
            )
        if output.ndim < len(self.shape) and not is_functorch_wrapped_tensor(output):
            raise UsageError(
                f"the {type(self).__name__} likelihood expects outputs ({', '.join(self.shape)}, "
                f"…), and the model returned the shape {tuple(output.shape)}: call it on a batch, "
                "of one sample too, and keep that dimension (no squeeze() without dim=)"
            )
        return (output,)


class Categorical(_Family):
    """One of several classes: ``F.cross_entropy`` of logits.

    Rows that the loss leaves out (``ignore_index``, padding masks) have no gradient and no part in
    the Fisher. Class and sample weights are read off the gradient where targets are certain.

    Args:
        dim: Dimension of the classes: -1 is (samples, …, classes), 1 what ``F.cross_entropy``
            takes for (samples, classes, positions). None finds out which of the two it is: there
            the loss's gradient adds up to zero.
        hard: True if targets are certain classes, so that a row's gradient gives its weight; False
            for label smoothing and mixed targets, whose rows weigh the same. None finds out, for
            three classes or more; of two, rows of different weight are taken for soft targets.

    Example:
        >>> import torch
        >>> from smallfry.optim import KFAC
        >>> from smallfry.curvature import Categorical
        >>> optimizer = KFAC(torch.nn.Linear(4, 3), lr=0.1, likelihood=Categorical(hard=False))
    """

    shape = ("samples", "classes")

    def __init__(self, dim: int | None = None, hard: bool | None = None) -> None:
        self._dim, self.hard = dim, hard
        self._found = -1

    @property
    def dim(self) -> int:
        """Class dimension."""
        return self._found if self._dim is None else self._dim

    def _find(self, gradient: Tensor) -> None:
        """Find the class dimension, along which ∇ sums to zero."""
        if self._dim is None and gradient.ndim > 2 and bool(gradient.any()):
            sums = {d: float(gradient.sum(d).abs().sum()) for d in (-1, 1)}
            self._found = -1 if sums[-1] <= sums[1] else 1

    def row_weights(self, outputs: Outputs, index: int, gradient: Tensor) -> RowWeights | None:
        """Infer weights from rows without a gradient, and from gradient over probability."""
        self._find(gradient)
        p, g = self._probabilities(outputs), gradient.movedim(self.dim, -1)
        counts = (g != 0).any(-1)
        rows = certain_rows(p, g, outputs[0].dtype)
        certain = self.hard
        if certain is None:
            told = rows.telling & counts
            certain = bool(rows.fits[told].all()) and (
                bool(told.any()) or common_weight(rows.rho[counts], rows.error[counts]) is not None
            )
        found = read_weights(rows.rho, counts, certain, rows.error)
        if not self.hard:
            found = with_certain_rows(found, p, outputs[0].dtype)
        return _unsqueezed(found, self.dim)

    def given_weights(self, outputs: Outputs, index: int, given: Any) -> RowWeights:
        """Return one weight per row, whatever its class."""
        return given_weights(given, outputs[index], self.dim)

    def _probabilities(self, outputs: Outputs) -> Tensor:
        """Compute probabilities (samples, …, classes)."""
        z = outputs[0].movedim(self.dim, -1)
        return z.to(_precise(z)).softmax(-1)

    def is_density(self, outputs: Outputs) -> bool:
        """Accept logits of −∞ for impossible classes, as long as one class is left."""
        top = outputs[0].amax(self.dim)
        return bool(top.isfinite().all()) and not bool(outputs[0].isnan().any())

    def _back(self, g: Tensor, z: Tensor) -> Outputs:
        return (g.movedim(-1, self.dim).to(z),)

    def sample_gradients(self, outputs: Outputs, generator: torch.Generator) -> Outputs:
        """Return probabilities minus the one-hot sample."""
        p = self._probabilities(outputs)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
        return self._back(p - F.one_hot(drawn.view(p.shape[:-1]), p.shape[-1]), outputs[0])

    def columns(self, outputs: Outputs) -> Iterator[Outputs]:
        """Return √p_k (p − e_k) for each class k, at each position."""
        p = self._probabilities(outputs)
        positions = p[0, ..., 0].numel()
        flat = p.reshape(len(p), positions, -1)
        for position in range(positions):
            for k in range(p.shape[-1]):
                column = torch.zeros_like(flat)
                column[:, position] = flat[:, position]
                column[:, position, k] -= 1
                column[:, position] *= flat[:, position, k, None].sqrt()
                yield self._back(column.reshape(p.shape), outputs[0])

    def hessian_product(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Compute (diag(p) − p pᵀ) u."""
        p, u = self._probabilities(outputs), tangents[0].movedim(self.dim, -1)
        return self._back(p * (u - (p * u).sum(-1, keepdim=True)), tangents[0])

    def divergence(
        self, before: Outputs, after: Outputs, weights: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Compute Σ p log(p / p')."""
        old, new = (z[0].movedim(self.dim, -1).log_softmax(-1) for z in (before, after))
        terms = torch.where(old.isneginf(), 0.0, old.exp() * (old - new)).movedim(-1, self.dim)
        return _by_sample(_weighted(terms, weights)).sum(1)

    def loss_factor(
        self, outputs: Outputs, gradients: Outputs, stated: float = 1.0
    ) -> Scale | None:
        """Infer the factor from classes with target 0, where the gradient is the factor times p."""
        self._find(gradients[0])
        p, g = self._probabilities(outputs), gradients[0].movedim(self.dim, -1)
        rounding = rounding_of_probabilities(outputs[0], p.shape[-1])
        likely = p > 0.01 / p.shape[-1]
        scale = infer_scale(g[likely].to(p), p[likely], stated * rounding)
        most = stated if scale is None else max(stated, scale.factor)
        g = g.to(p)
        balanced = (g.sum(-1).abs() <= 0.02 * g.abs().sum(-1) + most * rounding).all()
        if bool(balanced) or not bool(g.isfinite().all()):
            return scale
        return (scale or Scale(most, False, False))._replace(fits=False)

    def targets(
        self,
        outputs: Outputs,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor | None] | None = None,
    ) -> float:
        """Count positions."""
        return outputs[0][0].numel() / outputs[0].shape[self.dim] * _mean_weight(weights)

    def mean_factor(self, outputs: Outputs) -> float:
        """Return 1 / positions."""
        return outputs[0].shape[self.dim] / outputs[0][0].numel()


class Bernoulli(_Family):
    """Independent binary outputs.

    Args:
        inputs: "logits" (``binary_cross_entropy_with_logits``), or "probabilities" for a model
            with the sigmoid inside (``binary_cross_entropy``).
        hard: True if targets are 0 or 1, so that the gradient at an output gives its weight
            (``weight``, ``pos_weight``). False takes all outputs with a gradient for alike.

    Example:
        >>> import torch
        >>> from smallfry.optim import KFAC
        >>> from smallfry.curvature import Bernoulli
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Sigmoid())
        >>> optimizer = KFAC(model, lr=0.1, likelihood=Bernoulli("probabilities"))
    """

    def __init__(self, inputs: str = "logits", hard: bool = False) -> None:
        if inputs not in ("logits", "probabilities"):
            raise UsageError(f"Bernoulli accepts 'logits' or 'probabilities', not '{inputs}'")
        self.inputs, self.hard = inputs, hard

    def row_weights(self, outputs: Outputs, index: int, gradient: Tensor) -> RowWeights | None:
        """Infer weights from outputs without a gradient, and from gradient over probability."""
        p, g = self._probabilities(outputs), gradient.to(_precise(gradient))
        if self.inputs == "probabilities":
            g = g * p * (1 - p)
        side = torch.where(g > 0, p, 1 - p).clamp_min(torch.finfo(p.dtype).tiny)
        error = rounding_of(g, outputs[0].dtype) / side
        # a certain output that meets its target has no gradient either, and no curvature
        certain = (p * (1 - p) < torch.finfo(p.dtype).eps) & (not self.hard)
        return read_weights(g.abs() / side, (gradient != 0) | certain, self.hard, error)

    def _probabilities(self, outputs: Outputs) -> Tensor:
        z = outputs[0].to(_precise(outputs[0]))
        if self.inputs == "logits":
            return z.sigmoid()
        if bool(((z < 0) | (z > 1)).any()):
            raise UsageError(
                "the likelihood bernoulli of probabilities got model outputs outside 0 … 1; "
                "if the model returns logits, use likelihood='bernoulli'"
            )
        return z

    def _to_output(self, residual: Tensor, p: Tensor) -> Tensor:
        """Propagate a gradient at the logits to the outputs, through the inner sigmoid."""
        if self.inputs == "logits":
            return residual
        return residual / (p * (1 - p)).clamp_min(torch.finfo(p.dtype).eps)

    def sample_gradients(self, outputs: Outputs, generator: torch.Generator) -> Outputs:
        """Return p minus the sample, over p (1 − p) for an inner sigmoid."""
        p = self._probabilities(outputs)
        drawn = torch.bernoulli(p, generator=generator)
        return (self._to_output(p - drawn, p).to(outputs[0]),)

    def columns(self, outputs: Outputs) -> Iterator[Outputs]:
        """Return √(p (1 − p)) at one output after the other."""
        p = self._probabilities(outputs)
        root = self._to_output((p * (1 - p)).sqrt(), p)
        yield from _one_by_one(root.to(outputs[0]))

    def hessian_product(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Compute p (1 − p) u, or u / (p (1 − p))."""
        p = self._probabilities(outputs)
        root = self._to_output((p * (1 - p)).sqrt(), p)
        return ((root**2 * tangents[0]).to(tangents[0]),)

    def divergence(
        self, before: Outputs, after: Outputs, weights: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Compute p log(p / p') + (1 − p) log((1 − p) / (1 − p'))."""
        old, new = (self._probabilities(z) for z in (before, after))
        tiny = torch.finfo(old.dtype).tiny
        yes = old * (old.clamp_min(tiny) / new.clamp_min(tiny)).log()
        no = (1 - old) * ((1 - old).clamp_min(tiny) / (1 - new).clamp_min(tiny)).log()
        return _by_sample(_weighted(yes + no, weights)).sum(1)

    def loss_factor(
        self, outputs: Outputs, gradients: Outputs, stated: float = 1.0
    ) -> Scale | None:
        """Infer the factor from certain targets, with a gradient of the factor times p or 1 − p."""
        p, g = self._probabilities(outputs), gradients[0]
        expected = torch.where(g > 0, p, 1 - p)
        likely = expected > 0.01
        if self.inputs == "probabilities":
            slope = p * (1 - p)  # PyTorch bounds the division by it in the gradient
            g, likely = g * slope, likely & (slope > 1e-12)
        rounding = stated * rounding_of_probabilities(outputs[0])
        return infer_scale(g[likely].abs().to(p), expected[likely], rounding)

    def targets(
        self,
        outputs: Outputs,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor | None] | None = None,
    ) -> float:
        """Count outputs."""
        return outputs[0][0].numel() * _mean_weight(weights)

    def mean_factor(self, outputs: Outputs) -> float:
        """Return 1 / outputs."""
        return 1.0 / outputs[0][0].numel()


class Gaussian(_Family):
    """Independent outputs with a known variance: ½ (y − f)² / variance.

    The scale of such a loss can't be inferred from gradients, so it is not checked.

    Args:
        variance: Variance of the targets around the outputs.
        masked: True if outputs without a gradient are masked out of the loss. Otherwise they
            may be those that meet their targets exactly.

    Example:
        >>> import torch
        >>> from smallfry.optim import KFAC
        >>> from smallfry.curvature import Gaussian
        >>> optimizer = KFAC(torch.nn.Linear(4, 1), lr=0.1, likelihood=Gaussian(variance=0.25))
    """

    def __init__(self, variance: float = 1.0, masked: bool = False) -> None:
        if not variance > 0:
            raise UsageError(
                f"the variance of a gaussian likelihood must be positive, not {variance}"
            )
        self.variance, self.masked = variance, masked

    def row_weights(self, outputs: Outputs, index: int, gradient: Tensor) -> RowWeights | None:
        """Infer weights from outputs without a gradient."""
        if not self.masked:
            return RowWeights(None, None)
        return read_weights(gradient, gradient != 0, False)

    def sample_gradients(self, outputs: Outputs, generator: torch.Generator) -> Outputs:
        """Return standard normal noise over the standard deviation."""
        z = outputs[0]
        noise = torch.randn(
            z.shape, generator=generator, dtype=_precise(z), device=generator.device
        )
        return ((noise / math.sqrt(self.variance)).to(z),)

    def columns(self, outputs: Outputs) -> Iterator[Outputs]:
        """Return 1 / standard deviation at one output after the other."""
        yield from _one_by_one(torch.full_like(outputs[0], 1 / math.sqrt(self.variance)))

    def hessian_product(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Compute u / variance."""
        return (tangents[0] / self.variance,)

    def divergence(
        self, before: Outputs, after: Outputs, weights: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Compute ½ (f' − f)² / variance."""
        squares = _weighted((after[0] - before[0]) ** 2, weights)
        return _by_sample(squares).sum(1) / (2 * self.variance)

    def targets(
        self,
        outputs: Outputs,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor | None] | None = None,
    ) -> float:
        """Count outputs, times the mean squared error over the variance if that is above 1.

        Targets that are farther from the outputs than the variance implies have another scale than
        was stated. So a step is as long relative to them in whatever unit they are given.
        """
        count = outputs[0][0].numel() * _mean_weight(weights)
        if gradients[0] is None or not bool(gradients[0].isfinite().all()):
            return count
        squares, one = gradients[0].double() ** 2, None if weights is None else weights[0]
        if one is not None:  # which is in the gradients, too
            share = one.double().expand_as(squares)
            squares = torch.where(share > 0, squares / share, 0.0) / share.mean().clamp_min(1e-300)
        return count * max(1.0, float(squares.mean()) * self.variance)

    def mean_factor(self, outputs: Outputs) -> float:
        """Return 2 / outputs: ``F.mse_loss`` has no ½."""
        return 2.0 * self.variance / outputs[0][0].numel()


def _one_by_one(root: Tensor) -> Iterator[Outputs]:
    flat = _by_sample(root)
    for index in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, index] = flat[:, index]
        yield (column.reshape(root.shape),)


def _weighted(terms: Tensor, weights: Sequence[Tensor | None] | None) -> Tensor:
    one = None if weights is None else weights[0]
    return terms if one is None else terms * one


def _mean_weight(weights: Sequence[Tensor | None] | None) -> float:
    one = None if weights is None else weights[0]
    return 1.0 if one is None else float(one.double().mean())


def _unsqueezed(found: RowWeights | None, dim: int) -> RowWeights | None:
    if found is None or found.values is None:
        return found
    return found._replace(values=found.values.unsqueeze(dim))


def _by_sample(tensor: Tensor) -> Tensor:
    """Reshape to (samples, outputs); a head of one output may lack that dimension."""
    return tensor.reshape(len(tensor), -1)


def _precise(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32
