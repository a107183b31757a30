"""Exact quadratic model of a step on the batch: M(Δ) = ∇Lᵀ Δ + ½ Δᵀ (GGN + λ I) Δ.

The generalised Gauss-Newton matrix is Jᵀ H J with J the Jacobian of the network's outputs and H
the likelihood's Hessian there; J Δ takes one forward-mode pass over the batch, without gradients.
The best step lengths follow Martens and Grosse 2015 (arXiv 1503.05671, sections 6.4 and 7), the
reduction ratio their section 6.5. L is in units of the mean negative log-likelihood.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from smallfry._torch import tree_map, without_onednn
from smallfry.curvature import Observation
from smallfry.curvature.observer import Observer
from smallfry.optim.collectives import Collectives

Outputs = tuple[Tensor, ...]


class Batch(NamedTuple):
    """Current batch with row weights, whose forward passes can be rerun."""

    observations: Sequence[Observation]  # with the arguments of the forward passes
    observer: Observer  # of the model
    parameters: Mapping[str, nn.Parameter]  # by name
    samples: float  # of all processes
    factor: float  # the training loss over the mean negative log-likelihood
    collectives: Collectives


class QuadraticStep(NamedTuple):
    """Minimum of M over a set of directions."""

    step: dict[str, Tensor]  # by parameter name
    curvature: float  # of the step: twice its divergence


def best_step(
    batch: Batch,
    grads: Mapping[str, Tensor],
    bases: Sequence[Mapping[str, Tensor]],
    damping: Mapping[str, float],
) -> QuadraticStep:
    """Find the combination of directions that minimises M.

    Args:
        batch: The current batch.
        grads: Gradients of L by parameter name.
        bases: Directions, each by parameter name.
        damping: λ by parameter name.
    """
    count = len(bases)
    curved = torch.zeros(count, count, dtype=torch.float64)
    for seen in batch.observations:
        pushed = [push_forward(batch.observer, seen, b, batch.parameters)[1] for b in bases]
        for i in range(count):
            bent = seen.hessian_product(pushed[i])
            for j in range(count):
                curved[i, j] += _dot(bent, pushed[j]) / batch.samples
    curved = batch.collectives.sum(curved.to(batch.collectives.device)).cpu()
    ridge = torch.zeros_like(curved)
    slope = torch.zeros(count, dtype=torch.float64)
    for i, basis in enumerate(bases):
        slope[i] = sum(float((grads[name] * d).sum()) for name, d in basis.items())
        for j, other in enumerate(bases):
            ridge[i, j] = sum(
                damping[name] * float((d * other[name]).sum()) for name, d in basis.items()
            )
    lengths = -(torch.linalg.pinv(curved + ridge, hermitian=True) @ slope)
    step = {
        name: sum((float(c) * b[name] for c, b in zip(lengths, bases, strict=True)), start=0 * v)
        for name, v in bases[0].items()
    }
    return QuadraticStep(step, float(lengths @ curved @ lengths))


def adapted_damping(factor: float, ratio: float | None, steps: int) -> float:
    """Adapt λ (Levenberg–Marquardt): lower it if M predicted the loss well, else raise it.

    Args:
        factor: That damping is multiplied by so far.
        ratio: The reduction ratio; None leaves the factor as it is.
        steps: Since it was last adapted.
    """
    omega = 0.95**steps
    if ratio is not None and ratio > 0.75:
        return max(factor * omega, 1e-6)
    if ratio is not None and ratio < 0.25:
        return min(factor / omega, 1e6)
    return factor


def reduction_ratio(
    batch: Batch, step: Mapping[str, Tensor], damping: Mapping[str, float]
) -> float | None:
    """Compute the ratio of the actual to the predicted decrease of the loss.

    −∞ if M foretells a rise and it comes; None if there is nothing to learn from.

    The targets are not needed: the gradient that arrived at the outputs gives the linear part of
    the real change, and the divergence of the likelihood the rest.
    """
    factor = batch.factor * batch.collectives.count  # processes average their gradients
    linear = real = curved = 0.0
    for seen in batch.observations:
        before, tangents = push_forward(batch.observer, seen, step, batch.parameters)
        after = run(batch.observer, seen, batch.parameters, step)
        gradients = [
            torch.zeros_like(z) if g is None else g
            for g, z in zip(seen.output_gradients, before, strict=True)
        ]
        linear += _dot(gradients, tangents) / factor
        moved = [new - old for new, old in zip(after, before, strict=True)]
        likelihood = batch.observer.likelihood
        divergence = likelihood.divergence(before, after, seen.row_shares)
        real += _dot(gradients, moved) / factor + float(divergence.double().sum()) / batch.samples
        curved += _dot(seen.hessian_product(tangents), tangents) / batch.samples
    linear, real, curved = batch.collectives.sums([linear, real, curved])
    ridge = sum(damping[n] * float((d**2).sum()) for n, d in step.items())
    foretold = linear + 0.5 * (curved + ridge)
    if foretold < 0:
        return real / foretold
    return -math.inf if real > 0 else None


def targets_of(batch: Batch, hidden: bool) -> float:
    """Count the targets per sample, weighted by rows, over the whole batch.

    Args:
        batch: The current batch.
        hidden: A GradScaler has multiplied the loss by an unknown number, so that the
            size of gradients is unknown.
    """
    unit = batch.samples / batch.collectives.count / batch.factor
    found = 0.0
    for seen in batch.observations:
        scaled = tuple(None if g is None or hidden else g * unit for g in seen.output_gradients)
        likelihood = seen.likelihood or batch.observer.likelihood
        found += likelihood.targets(seen.outputs, scaled, seen.row_shares) * seen.size
    return batch.collectives.sums([found])[0] / batch.samples


def push_forward(
    observer: Observer,
    seen: Observation,
    direction: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> tuple[Outputs, Outputs]:
    """Compute the outputs of an observed forward pass, and J Δ."""
    function, chosen, tangents = _as_function(observer, seen, parameters, direction)

    def pushed() -> tuple[Outputs, Outputs]:
        # neither fused attention nor oneDNN's LSTM has a forward-mode derivative
        with without_onednn(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            make: Any = forward_ad.make_dual
            read: Any = forward_ad.unpack_dual
            duals = {name: make(p, tangents[name]) for name, p in chosen.items()}
            found = [read(z) for z in function(duals)]
        moved = [torch.zeros_like(z) if t is None else t for z, t in found]
        return tuple(z.detach() for z, _ in found), tuple(moved)

    result: tuple[Outputs, Outputs] = observer.rerun(seen, pushed)
    return result


def run(
    observer: Observer,
    seen: Observation,
    parameters: Mapping[str, nn.Parameter],
    step: Mapping[str, Tensor],
    kernels: Sequence[SDPBackend] = (SDPBackend.MATH,),
) -> Outputs:
    """Rerun an observed forward pass with moved parameters.

    Args:
        observer: Observer of the model.
        seen: The forward pass.
        parameters: Parameters by name.
        step: Change of the parameters.
        kernels: Attention's, such as ``push_forward`` has; none given takes what is fastest.
    """
    function, chosen, moves = _as_function(observer, seen, parameters, step)
    moved = {name: chosen[name] + moves[name] for name in chosen}

    def again() -> Outputs:
        with sdpa_kernel(list(kernels)) if kernels else nullcontext():
            return function(moved)

    outputs: Outputs = observer.rerun(seen, again)
    return outputs


def _as_function(
    observer: Observer,
    seen: Observation,
    parameters: Mapping[str, nn.Parameter],
    direction: Mapping[str, Tensor],
) -> tuple[Callable[[dict[str, Tensor]], Outputs], dict[str, Tensor], dict[str, Tensor]]:
    """Express the module as a function of some parameters, with their values and a direction."""
    root: Any = observer.root
    root = getattr(root, "_orig_mod", root)
    paths = {p: path for path, p in root.named_parameters()}
    buffers = {path: b.clone() for path, b in root.named_buffers()}
    chosen = {paths[parameters[name]]: parameters[name].detach() for name in direction}
    tangents = {paths[parameters[name]]: d for name, d in direction.items()}

    def function(values: dict[str, Tensor]) -> Outputs:
        # containers of its own, as a model may put other things into them
        given, named = tree_map(lambda leaf: leaf, (seen.arguments, seen.keywords))
        output = functional_call(root, {**buffers, **values}, given, named)
        return observer.likelihood.select(output)

    return function, chosen, tangents


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return float(sum((a.double() * b.double()).sum() for a, b in pairs))
