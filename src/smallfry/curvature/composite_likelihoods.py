"""Likelihoods of outputs with several parts, or of any ``torch.distributions`` density."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from smallfry._torch import tree_flatten, tree_unflatten
from smallfry.curvature.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Outputs,
)
from smallfry.curvature.loss_scale import Scale
from smallfry.curvature.row_weights import RowWeights
from smallfry.curvature.scaled import Scaled
from smallfry.curvature.stablemax import StableMax
from smallfry.errors import UsageError, nearest


class Joint(Likelihood):
    """Independent densities of several parts of the model's output.

    Args:
        parts: A likelihood for each part, by attribute, key or index in the model's output.

    Example:
        >>> from smallfry.curvature import Bernoulli, Categorical, Joint
        >>> likelihood = Joint({"logits": Categorical(), "halt_logits": Bernoulli()})
    """

    def __init__(self, parts: Mapping[str | int, Likelihood]) -> None:
        if not parts:
            raise UsageError("a joint likelihood needs at least one part")
        self.parts = dict(parts)

    def select(self, output: Any) -> Outputs:
        """Select the tensors of all parts, in order."""
        found = [part.select(_part(output, key)) for key, part in self.parts.items()]
        self._counts = [len(tensors) for tensors in found]
        return tuple(z for tensors in found for z in tensors)

    def of_last(self) -> "Joint":
        """Return the likelihood of each part's last outputs."""
        own = Joint({key: part.of_last() for key, part in self.parts.items()})
        own._counts = self._counts
        return own

    def _each(self, outputs: Outputs) -> Iterator[tuple[Likelihood, Outputs]]:
        start = 0
        for part, count in zip(self.parts.values(), self._counts, strict=True):
            yield part, outputs[start : start + count]
            start += count

    def rows(self, outputs: Outputs) -> int:
        """Return the rows of all parts.

        Raises:
            UsageError: They differ.
        """
        found = {
            key: part.rows(z)
            for key, (part, z) in zip(self.parts, self._each(outputs), strict=True)
        }
        if len({*found.values()}) > 1:
            raise UsageError(
                f"parts of the output have different first dimensions ({found}): expected the same "
                "samples in all, (samples, positions, …) instead of rows of both"
            )
        return next(iter(found.values()))

    def is_density(self, outputs: Outputs) -> bool:
        """Return whether every part is a density."""
        return all(part.is_density(z) for part, z in self._each(outputs))

    def sample_gradients(self, outputs: Outputs, generator: torch.Generator) -> Outputs:
        """Sample a target for each part."""
        drawn = (part.sample_gradients(z, generator) for part, z in self._each(outputs))
        return tuple(g for gradients in drawn for g in gradients)

    def columns(self, outputs: Outputs) -> Iterator[Outputs]:
        """Return the columns of one part after the other, zero elsewhere."""
        start = 0
        for part, z in self._each(outputs):
            for column in part.columns(z):
                zeros = [torch.zeros_like(other) for other in outputs]
                zeros[start : start + len(z)] = column
                yield tuple(zeros)
            start += len(z)

    def hessian_product(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Apply the Hessian part by part."""
        pairs = zip(self._each(outputs), self._each(tangents), strict=True)
        found = (part.hessian_product(z, u) for (part, z), (_, u) in pairs)
        return tuple(product for products in found for product in products)

    def divergence(
        self, before: Outputs, after: Outputs, weights: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Sum the divergences of the parts."""
        rest = iter([None] * len(before) if weights is None else weights)
        found = [
            part.divergence(z, new, [next(rest) for _ in z])
            for (part, z), (_, new) in zip(self._each(before), self._each(after), strict=True)
        ]
        return torch.stack(found).sum(0)

    def row_weights(self, outputs: Outputs, index: int, gradient: Tensor) -> RowWeights | None:
        """Infer row weights from the part that the output belongs to."""
        _, part, z, own = self._part_of(outputs, index)
        return part.row_weights(z, own, gradient)

    def given_weights(self, outputs: Outputs, index: int, given: Any) -> RowWeights:
        """Return the weights for the output's own part; a mapping is keyed by part."""
        key, part, z, own = self._part_of(outputs, index)
        if not isinstance(given, Mapping) or key not in given:
            raise ValueError(f"expected a mapping with weights for every part, including '{key}'")
        return part.given_weights(z, own, given[key])

    def _part_of(self, outputs: Outputs, index: int) -> tuple[Any, Likelihood, Outputs, int]:
        """Return the part of an output, with its name, its outputs and its index there."""
        start = 0
        for key, (part, z) in zip(self.parts, self._each(outputs), strict=True):
            if index < start + len(z):
                return key, part, z, index - start
            start += len(z)
        raise IndexError(index)

    def mean_factor(self, outputs: Outputs) -> float:
        """Return the common factor of all parts, if there is one."""
        found = [part.mean_factor(z) for part, z in self._each(outputs)]
        if max(found) > (1 + 1e-9) * min(found):
            raise UsageError(
                "loss_scale='mean' differs between the parts of this output "
                f"({', '.join(f'{number:.4g}' for number in found)}): give one number"
            )
        return found[0]

    def targets(
        self,
        outputs: Outputs,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor | None] | None = None,
    ) -> float:
        """Sum the targets of the parts."""
        total, start = 0.0, 0
        weights = [None] * len(outputs) if weights is None else weights
        for part, z in self._each(outputs):
            own = slice(start, start + len(z))
            total += part.targets(z, gradients[own], weights[own])
            start += len(z)
        return total

    def loss_factor(
        self, outputs: Outputs, gradients: Outputs, stated: float = 1.0
    ) -> Scale | None:
        """Return the factor of the part that is farthest from 1."""
        pairs = zip(self._each(outputs), self._each(gradients), strict=True)
        found = [part.loss_factor(z, g, stated) for (part, z), (_, g) in pairs]
        scales = [scale for scale in found if scale is not None]
        wrong = [scale for scale in scales if not scale.fits]
        if wrong or not scales:
            return wrong[0] if wrong else None
        return max(scales, key=lambda s: abs(math.log(max(s.factor, 1e-30))))


class FromDistribution(Likelihood):
    """Any density of ``torch.distributions``.

    Args:
        function: From the model's output to a Distribution whose batch shape starts with the
            samples. Gradients go through ``log_prob``.

    Example:
        >>> from torch.distributions import Poisson
        >>> from smallfry.curvature import FromDistribution
        >>> likelihood = FromDistribution(lambda outputs: Poisson(outputs.exp()))
    """

    def __init__(self, function: Callable[[Any], Distribution]) -> None:
        self.function = function

    def select(self, output: Any) -> Outputs:
        """Select all floating-point tensors in the output that have a gradient."""
        leaves, self._structure = tree_flatten(output)
        chosen = [isinstance(t, Tensor) and t.is_floating_point() for t in leaves]
        if not any(chosen):
            raise UsageError("the model's output has no floating-point tensor for a density")
        # the structure is kept, the tensors are not: they would keep the graph alive
        self._leaves = [None if c else leaf for c, leaf in zip(chosen, leaves, strict=True)]
        self._chosen = chosen
        return tuple(leaf for c, leaf in zip(chosen, leaves, strict=True) if c)

    def of_last(self) -> "FromDistribution":
        """Rebuild the structure of the last output, with its other values."""
        return copy.copy(self)

    def rows(self, outputs: Outputs) -> int:
        """Return the first size of the density's batch, as outputs may hold other tensors."""
        if not self.is_density(outputs):
            return super().rows(outputs)
        return next(iter(self._distribution(outputs).batch_shape), 1)

    def sample_gradients(self, outputs: Outputs, generator: torch.Generator) -> Outputs:
        """Return −∇ log p of one sample, drawn with a seed from the generator."""
        free = [z.detach().requires_grad_() for z in outputs]
        with torch.enable_grad():
            distribution = self._distribution(free)
            seed = int(
                torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
            )
            devices = [outputs[0].device] if outputs[0].is_cuda else []
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                torch.manual_seed(seed)
                drawn = distribution.sample()
            score = -distribution.log_prob(drawn).sum()
            found = torch.autograd.grad(score, free, allow_unused=True)
        return tuple(
            torch.zeros_like(z) if g is None else g for g, z in zip(found, free, strict=True)
        )

    def divergence(
        self, before: Outputs, after: Outputs, weights: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Compute ``torch.distributions.kl_divergence`` where implemented; it has no weights."""
        old, new = self._distribution(before), self._distribution(after)
        try:
            found = kl_divergence(old, new)
        except NotImplementedError:
            raise UsageError(
                f"torch.distributions has no kl_divergence of {type(old).__name__}; add one with "
                f"register_kl"
            ) from None
        return found.reshape(*found.shape[:1], -1).sum(1)

    def targets(
        self,
        outputs: Outputs,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor | None] | None = None,
    ) -> float:
        """Count the events per sample."""
        return math.prod(self._distribution(outputs).batch_shape[1:])

    def _distribution(self, outputs: Sequence[Tensor]) -> Distribution:
        given = iter(outputs)
        pairs = zip(self._leaves, self._chosen, strict=True)
        leaves = [next(given) if chosen else leaf for leaf, chosen in pairs]
        distribution = self.function(tree_unflatten(leaves, self._structure))
        if not isinstance(distribution, Distribution):
            raise UsageError(
                f"the likelihood function returned {type(distribution).__name__}, expected "
                "a torch.distributions.Distribution"
            )
        return distribution


NAMED: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    # mean over positions, as of (samples, classes, height, width) by F.cross_entropy
    "categorical_mean": lambda: Scaled(Categorical(dim=1), "mean"),
    "stablemax": StableMax,
    "stablemax_mean": lambda: Scaled(StableMax(), "mean"),  # over the positions of a sample
    "bernoulli": Bernoulli,
    "bernoulli_mean": lambda: Scaled(Bernoulli(), "mean"),  # over all values of a sample
    "bernoulli_probabilities": lambda: Bernoulli("probabilities"),
    "gaussian": Gaussian,
    "gaussian_mean": lambda: Scaled(Gaussian(), "mean"),  # F.mse_loss
}


def as_likelihood(
    given: "str | Likelihood | Mapping[str | int, Any] | Callable[[Any], Distribution]",
) -> Likelihood:
    """Build a likelihood from its name, a mapping of output parts to likelihoods, or a function.

    Raises:
        UsageError: None of these.

    Example:
        >>> from smallfry.curvature import as_likelihood
        >>> type(as_likelihood("gaussian")).__name__
        'Gaussian'
        >>> type(as_likelihood({"logits": "categorical", "halt_logits": "bernoulli"})).__name__
        'Joint'
    """
    if isinstance(given, Likelihood):
        return given
    if isinstance(given, type) and issubclass(given, Likelihood):
        raise UsageError(f"a likelihood must be an object: {given.__name__}(), not the class")
    if isinstance(given, str):
        if given not in NAMED:
            raise UsageError(f"unknown likelihood '{given}'{nearest(given, NAMED)}")
        return NAMED[given]()
    if isinstance(given, Mapping):
        return Joint({key: as_likelihood(value) for key, value in given.items()})
    if callable(given):
        return FromDistribution(cast(Any, given))
    raise UsageError(
        f"a likelihood must be a name ({', '.join(NAMED)}), a mapping from parts of the output to "
        f"likelihoods, or a function to a torch.distributions object, not {type(given).__name__}"
    )


def _part(output: Any, key: str | int) -> Any:
    try:
        if isinstance(key, str) and hasattr(output, key):
            return getattr(output, key)
        if isinstance(output, Tensor):  # whose indices are samples
            raise KeyError(key)
        return output[key]
    except (KeyError, IndexError, TypeError):
        raise UsageError(
            f"the likelihood refers to part '{key}' of the model's output, which is a "
            f"{type(output).__name__} without that part"
        ) from None
